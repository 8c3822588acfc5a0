"""The `sluice` command, and its subcommands `infer` and `status`.

Subcommands are the entry points of the group `sluice.commands`: callables that take the arguments after their name and
return the exit status (0: done, 1: it failed, 2: wrong usage). They are imported only when they are asked for, so that
the base install, which has no server, can say what a server needs.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, Final, TextIO

from sluice_client.client import Client
from sluice_client.errors import ClientError, InvalidRequest, ServerError
from sluice_client.inputs import fill, json_value, parse_assignments, parse_shapes, read_input
from sluice_client.results import Array, ModelIndex, ModelStatistics, Result
from sluice_client.settings import DEFAULT_DEADLINE_S, DEFAULT_PORT, Tls

COMMANDS_GROUP: Final = "sluice.commands"
STATUS_DEADLINE_S: Final = 5.0  # nobody watches a status command for longer

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

Command = Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None, commands: Iterable[EntryPoint] | None = None) -> int:
    """Run one subcommand; `commands` are the installed ones unless given. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = entry_points(group=COMMANDS_GROUP) if commands is None else commands
    try:
        return _dispatch(arguments, {entry_point.name: entry_point for entry_point in sorted(found)})
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, `head` for one, has seen enough; the interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str], by_name: dict[str, EntryPoint]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        write(sys.stdout if arguments else sys.stderr, _help(by_name))
        return DONE if arguments else USAGE
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version"):
        write(sys.stdout, f"sluice {version('sluice')}")
        return DONE
    if name not in by_name:
        return _fail(f"sluice: no command {name!r}; there are {', '.join(by_name)} (sluice --help)", USAGE)
    try:
        command: Command = by_name[name].load()
        return command(rest)
    except ModuleNotFoundError as error:
        return _fail(f"sluice {name} needs the Python package {error.name!r}: {_EXTRA}")


_EXTRA: Final = "install the server with pip install 'sluice[server]'"


def infer(argv: list[str]) -> int:
    """Send one request to a model and print its outputs."""
    parser = command_parser("infer", infer)
    add_request_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return run_command(parser, argv, _infer, DEFAULT_DEADLINE_S)


def status(argv: list[str]) -> int:
    """Show whether servers are up, their models and what these have done."""
    parser = command_parser("status", status)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each endpoint, one a line")
    return run_command(parser, argv, _status, STATUS_DEADLINE_S)


def _help(by_name: dict[str, EntryPoint]) -> str:
    lines = ["usage: sluice COMMAND [ARGUMENTS]", "", "commands:"]
    for name, entry_point in by_name.items():
        try:
            summary = (entry_point.load().__doc__ or "").strip().split("\n")[0]
        except ModuleNotFoundError:
            summary = f"not installed: {_EXTRA}"
        lines.append(f"  {name:<8}  {summary}")
    return "\n".join([*lines, "", "sluice COMMAND --help tells more; sluice --version prints the version"])


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """What an inference request is made of: the model, its outputs, and the inputs, which `read_inputs` reads."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input: NAME=file.npy, NAME=@file.npz:key, or NAME=JSON like X=[[1,2,3]] (repeatable)",
    )
    parser.add_argument("--fill", choices=["zeros", "random"], help="make the inputs that are not given with --input")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=D,D", help="the shape to make with --fill, like X=1,16"
    )
    parser.add_argument("--output", action="append", metavar="NAME", help="a wanted output; all without it")
    parser.add_argument("--model-version", default="", metavar="N", help="the model version; the newest without it")


def command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The options of every command that calls servers."""
    parser = argparse.ArgumentParser(prog=f"sluice {name}", description=command.__doc__)
    parser.add_argument(
        "--endpoint",
        action="append",
        metavar="ENDPOINT",
        help=f"host:port, grpcs://host:port, unix:///path, ... (repeatable; default localhost:{DEFAULT_PORT})",
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="how long a call may take")
    parser.add_argument("--tls-ca", metavar="FILE", help="trust these PEM certificates, and use TLS")
    parser.add_argument("--tls-cert", metavar="FILE", help="our own PEM certificate chain, for mutual TLS")
    parser.add_argument("--tls-key", metavar="FILE", help="its PEM private key")
    parser.add_argument("--tls-server-name", default="", metavar="NAME", help="the name in the server's certificate")
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    argv: list[str],
    action: Callable[[Client, argparse.Namespace], int],
    deadline_s: float,
) -> int:
    """Parse, connect, act; expected errors become one line and an exit status. `deadline_s` is what --deadline is by
    default.
    """
    parser.set_defaults(deadline=deadline_s)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else USAGE
    try:
        with Client(
            arguments.endpoint or f"localhost:{DEFAULT_PORT}",
            deadline_s=arguments.deadline,
            tls=read_tls(arguments),
        ) as client:
            return action(client, arguments)
    except InvalidRequest as error:
        return _fail(f"{parser.prog}: {error}", USAGE)
    except ClientError as error:
        return _fail(f"{parser.prog}: {error}")
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _fail(f"{parser.prog}: {error}", USAGE)


def read_tls(arguments: argparse.Namespace) -> Tls | None:
    """What the options say of TLS. OSError when a file cannot be read, InvalidRequest when they do not fit together."""
    if not (arguments.tls_ca or arguments.tls_cert or arguments.tls_key or arguments.tls_server_name):
        return None
    return Tls.from_files(
        root_certificates=arguments.tls_ca,
        certificate_chain=arguments.tls_cert,
        private_key=arguments.tls_key,
        server_name=arguments.tls_server_name,
    )


def _infer(client: Client, arguments: argparse.Namespace) -> int:
    inputs = read_inputs(client, arguments)
    result = client.infer(arguments.model, inputs, outputs=arguments.output, version=arguments.model_version)
    write(sys.stdout, json.dumps(_result_json(result)) if arguments.json else _result_text(result))
    return DONE


def read_inputs(client: Client, arguments: argparse.Namespace) -> dict[str, Array]:
    """The inputs that the options give or have made up, by name; asks the server for what it has to know of them."""
    texts = parse_assignments("--input", arguments.input)
    shapes = parse_shapes(arguments.shape)
    described = {}
    needs_types = arguments.fill or any(
        not text.endswith(".npy") and not text.startswith("@") for text in texts.values()
    )
    if needs_types:
        metadata = client.model_metadata(arguments.model, arguments.model_version)
        described = {tensor.name: tensor for tensor in metadata.inputs}
    inputs = {name: read_input(name, text, described) for name, text in texts.items()}
    if arguments.fill:
        missing = [tensor for tensor in described.values() if tensor.name not in inputs]
        inputs |= {tensor.name: fill(tensor, arguments.fill, shapes.pop(tensor.name, None)) for tensor in missing}
    if shapes:
        raise InvalidRequest(f"--shape {next(iter(shapes))}: this input is not made by --fill")
    return inputs


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "model_name": result.model_name,
        "model_version": result.model_version,
        "time_ms": round(result.timing.total_s * 1e3, 3),
        "outputs": {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "data": json_value(array)}
            for name, array in result.items()
        },
    }


def _result_text(result: Result) -> str:
    took = f"{result.timing.total_s * 1e3:.1f} ms from {result.timing.endpoint}"
    blocks = [f"{result.model_name} version {result.model_version}, {took}"]
    for name, array in result.items():
        blocks.append(f"{name}  {array.dtype}{list(array.shape)}\n{array}")
    return "\n\n".join(blocks)


def _status(client: Client, arguments: argparse.Namespace) -> int:
    reports = [_report(client, endpoint) for endpoint in client.endpoints]
    for report in reports:
        write(sys.stdout, json.dumps(report) if arguments.json else _report_text(report))
    return DONE if all(report.get("ready") for report in reports) else FAILED


def _report(client: Client, endpoint: str) -> dict[str, Any]:
    """What one server says about itself; `error` where it does not answer."""
    report: dict[str, Any] = {"endpoint": endpoint, "live": False, "ready": False}
    try:
        report["live"] = client.server_live(endpoint=endpoint)
        report["ready"] = client.server_ready(endpoint=endpoint)
        about = client.server_metadata(endpoint=endpoint)
        report["server"], report["version"] = about.name, about.version
        counters = {(entry.name, entry.version): entry for entry in client.statistics(endpoint=endpoint)}
        index = client.repository_index(endpoint=endpoint)
    except ServerError as error:
        return report | {"error": str(error)}
    report["models"] = [_model_report(model, counters.get((model.name, model.version))) for model in index]
    return report


def _model_report(model: ModelIndex, counters: ModelStatistics | None) -> dict[str, Any]:
    report: dict[str, Any] = {
        "name": model.name,
        "version": model.version,
        "state": model.state or "not loaded",
        "reason": model.reason,
    }
    if counters is not None:
        report |= {
            "requests": counters.success.count,
            "failed": counters.fail.count,
            "mean_batch": round(counters.mean_batch_rows, 2),
            "queue_ms": round(counters.queue.mean_ms, 3),
            "compute_ms": round(counters.compute_infer.mean_ms, 3),
            "total_ms": round(counters.success.mean_ms, 3),
        }
    return report


_COLUMNS: Final = (
    ("model", "name"),
    ("version", "version"),
    ("state", "state"),
    ("requests", "requests"),
    ("failed", "failed"),
    ("mean batch", "mean_batch"),
    ("queue ms", "queue_ms"),
    ("compute ms", "compute_ms"),
    ("total ms", "total_ms"),
    ("reason", "reason"),
)


def _report_text(report: dict[str, Any]) -> str:
    state = "ready" if report["ready"] else "live, not ready" if report["live"] else "not reachable"
    server = f", {report['server']} {report['version']}" if "server" in report else ""
    head = f"{report['endpoint']}: {state}{server}"
    if "error" in report:
        return f"{head}\n  {report['error']}"
    rows = [[title for title, _ in _COLUMNS]]
    rows += [[str(model.get(key, "")) for _, key in _COLUMNS] for model in report["models"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def write(stream: TextIO, text: str) -> None:
    """Write a line, at once."""
    stream.write(text + "\n")
    stream.flush()


def _fail(message: str, exit_status: int = FAILED) -> int:
    write(sys.stderr, message)
    return exit_status
