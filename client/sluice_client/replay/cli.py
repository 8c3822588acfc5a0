"""The command `sluice replay`: captured requests sent again, and an exit status for what is different."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sluice_client.cli import command_parser, read_tls, run_command, write
from sluice_client.client import Client
from sluice_client.errors import InvalidRequest
from sluice_client.load.open_loop import run_precisely
from sluice_client.replay.differences import DEFAULT_TOLERANCES
from sluice_client.replay.report import as_json, as_text
from sluice_client.replay.sending import replay as send_again
from sluice_client.replay.verdict import judge, measured, parse_ratios, parse_tolerance, recorded
from sluice_client.settings import DEFAULT_DEADLINE_S
from sluice_proto.capture import read_capture
from sluice_proto.errors import CaptureError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sluice_client.replay.sending import Replayed
    from sluice_proto.capture import Capture


def replay(argv: list[str]) -> int:
    """Send captured requests again at their times, and compare answers and latencies.

    Exit status: 0 the same; 1 something differs, or a server cannot be reached; 2 wrong usage, or no capture file;
    3 no verdict: nothing could be compared, or nothing differs, but this machine could not send in time.
    """
    parser = command_parser("replay", replay)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="what sluice serve --capture-file wrote")
    add("--speed", type=float, default=1.0, metavar="FACTOR", help="how many times as fast as they came (1)")
    add("--tolerance", metavar="RTOL/ATOL", help="how far floats may be off, like 1e-4/1e-6 (by datatype)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--against-recorded", action="store_true", help="expect the captured answers (the default)")
    source.add_argument(
        "--baseline-endpoint", metavar="ENDPOINT", help="expect what this server gives, to which all is sent before"
    )
    add(
        "--latency-ratio",
        nargs="+",
        action="extend",
        default=[],
        metavar="pN=RATIO",
        help="how many times as long a quantile of the latency may take as expected, like p50=1.2 p99=1.5",
    )
    add("--json", action="store_true", help="print one JSON object")
    return run_command(parser, argv, _replay, DEFAULT_DEADLINE_S)


def _replay(client: Client, arguments: argparse.Namespace) -> int:
    limits = parse_ratios(arguments.latency_ratio)
    tolerances = DEFAULT_TOLERANCES if arguments.tolerance is None else parse_tolerance(arguments.tolerance)
    if not 0 < arguments.speed < math.inf:
        raise InvalidRequest(f"--speed is {arguments.speed:g}, must be above 0")
    capture = _read(arguments.file)
    _reach(client)
    if arguments.baseline_endpoint is None:
        expected = recorded(capture)
    else:
        baseline = arguments.baseline_endpoint
        with Client(baseline, deadline_s=arguments.deadline, tls=read_tls(arguments)) as other:
            _reach(other)
        expected = measured(baseline, _send(capture, [baseline], arguments))
    replayed = _send(capture, client.endpoints, arguments)
    verdict = judge(capture.requests, expected, replayed, tolerances=tolerances, limits=limits)
    text = json.dumps(as_json(verdict, capture)) if arguments.json else as_text(verdict, capture)
    write(sys.stdout, text)
    return verdict.exit_status


def _reach(client: Client) -> None:
    """Raise what it takes when a server cannot be reached, or every request would tell so."""
    for endpoint in client.endpoints:
        client.server_live(endpoint=endpoint)


def _read(path: Path) -> Capture:
    try:
        capture = read_capture(path)
    except CaptureError as error:
        raise InvalidRequest(str(error)) from None
    if not capture.requests:
        raise InvalidRequest(f"{path} has no request in it")
    return capture


def _send(capture: Capture, endpoints: Sequence[str], arguments: argparse.Namespace) -> Replayed:
    last_s = capture.offsets_s()[-1] / arguments.speed
    to = ", ".join(endpoints)
    write(sys.stderr, f"sending {len(capture.requests)} requests to {to}, the last one after {last_s:.1f} s ...")
    deadline_s, tls = arguments.deadline, read_tls(arguments)
    return run_precisely(send_again(capture, endpoints, speed=arguments.speed, deadline_s=deadline_s, tls=tls))
