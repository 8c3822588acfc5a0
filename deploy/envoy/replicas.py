"""Serves the demo models by two servers behind Envoy on this machine: `make sidecar`, which the README here follows.

`python -m deploy.envoy.replicas --help` lists what can be changed. A server that ends is started again, as the kubelet
would, so that one can be killed or restarted to see what callers notice. Exit codes: 0 ended by SIGINT or SIGTERM,
1 when a server or Envoy does not start.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deploy.envoy.bootstrap import UNIX_PREFIX, Upstream, Variant
from deploy.envoy.sidecar import SidecarError, sidecar
from deploy.processes import LOOPBACK, SLUICE, STOP_TIMEOUT_S, free_port, wait_or_kill

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from deploy.envoy.sidecar import Sidecar

MODELS: Final = Path(__file__).resolve().parents[1] / "models"

PAUSE_S: Final = 5.0
"""Before a server that has failed is started again: it may fail again at once."""

POLL_S: Final = 0.1
"""Between two looks at who is healthy."""


class Replica:
    """A server on a Unix socket, and on a port of the loopback for REST; started again whenever it ends."""

    def __init__(self, number: int, repository: Path, folder: Path) -> None:
        self.number = number
        self.upstream = Upstream(f"{UNIX_PREFIX}{folder / f'{number}.sock'}", f"{LOOPBACK}:{free_port()}")
        host, _, port = self.upstream.rest.rpartition(":")
        self._command = [
            str(SLUICE), "serve", f"--model-repository={repository}", f"--grpc-address={self.upstream.grpc}",
            f"--http-address={host}", f"--http-port={port}", "--allow-metrics=false", "--log-info=false",
        ]  # fmt: skip
        self._lock = threading.Lock()  # guards the two below, once a keeper is there
        self._ending = False
        self._process = self._start()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """Of the process that is there now."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether its process is over, which before `keep` means that it could not start."""
        return self._process.poll() is not None

    def keep(self) -> None:
        """Start it again whenever it ends, from now on."""
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    def _start(self) -> subprocess.Popen[bytes]:
        # In a group of its own: Ctrl-C is for this program, which ends all in their order.
        return subprocess.Popen(self._command, process_group=0)  # noqa: S603 - our own

    def _keep(self) -> None:
        while True:
            code = self._process.wait()
            if code > 0:
                time.sleep(PAUSE_S)
            with self._lock:
                if self._ending:
                    return
                print(f"replica {self.number} (pid {self.pid}) has ended with {code} and is started again", flush=True)
                self._process = self._start()

    def end(self) -> None:
        """Ask it to finish what it has accepted, and not to come back."""
        with self._lock:
            self._ending = True
            self._process.terminate()

    def join(self) -> None:
        """Wait for its end."""
        wait_or_kill(self._process, STOP_TIMEOUT_S)
        if self._keeper is not None:
            self._keeper.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, and give the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="sluice-") as name:
        folder = Path(name)
        replicas = [Replica(number, options.model_repository, folder) for number in range(1, options.replicas + 1)]
        try:
            _serve(options, replicas, folder)
        except KeyboardInterrupt:
            return 0
        except SidecarError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            _end(replicas)
    return 0


def _end(replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        replica.end()
    for replica in replicas:
        replica.join()


def _serve(options: argparse.Namespace, replicas: Sequence[Replica], folder: Path) -> None:
    """Have Envoy before the replicas until a signal comes; SidecarError when one of them does not start."""
    variant = Variant(
        tuple(replica.upstream for replica in replicas),
        listen=options.listen,
        readiness=options.readiness,
        admin=options.admin,
        access_log=str(folder / "access.log"),
    )
    with sidecar(variant) as envoy:
        while len(envoy.healthy()) < len(replicas):
            for replica in replicas:
                if replica.has_ended:
                    raise SidecarError(f"replica {replica.number} does not start; what it says is above")
            time.sleep(POLL_S)
        for replica in replicas:
            replica.keep()
        _tell(envoy, replicas, folder)
        try:
            threading.Event().wait()
        finally:
            print("ending: Envoy sends its clients away, the servers answer what they have", flush=True)
            envoy.drain()
            _end(replicas)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.envoy.replicas", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--replicas", type=int, default=2, metavar="N", help="servers behind Envoy (%(default)s)")
    add("--model-repository", type=Path, default=MODELS, metavar="DIR", help="what they serve (the demo models)")
    add("--listen", default="127.0.0.1:9001", metavar="HOST:PORT", help="for clients (%(default)s)")
    add("--readiness", default="127.0.0.1:9002", metavar="HOST:PORT", help="GET /ready (%(default)s)")
    add("--admin", default="127.0.0.1:9901", metavar="HOST:PORT", help="Envoy's admin interface (%(default)s)")
    return parser


def _tell(envoy: Sidecar, replicas: Sequence[Replica], folder: Path) -> None:
    """Print how to call them."""
    print(
        f"{len(replicas)} servers behind Envoy are ready; Ctrl-C ends them all.",
        *(
            f"  replica {one.number}: pid {one.pid}, {one.upstream.grpc}, REST at {one.upstream.rest}"
            for one in replicas
        ),
        f"  Envoy: pid {envoy.pid}, admin interface http://{envoy.admin}, readiness http://{envoy.readiness}/ready",
        f"  access log: {folder / 'access.log'}",
        "From another terminal:",
        f"  {SLUICE} infer digits_mlp --fill random --endpoint {envoy.address}",
        f"  curl http://{envoy.address}/v2/models/digits_mlp",
        f"  curl http://{envoy.address}/json/models/digits_mlp/stats",
        f"  kill {replicas[0].pid}    # drains one replica, which is started again; callers do not notice",
        sep="\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
