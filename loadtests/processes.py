"""The servers that are measured, as processes of their own: ours, as a user would run it, and the bare grpcio echo."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.processes import LOOPBACK, SLUICE, free_port, running


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that answers on this port, of this machine unless somebody else started it."""

    pid: int | None
    """None for one that was not started here: what it uses cannot be measured."""
    port: int
    http_port: int = 0
    """Where it answers REST, if it does."""
    host: str = LOOPBACK

    @property
    def address(self) -> str:
        """HOST:PORT of its gRPC."""
        return f"{self.host}:{self.port}"

    @property
    def http_address(self) -> str:
        """HOST:PORT of its REST."""
        return f"{self.host}:{self.http_port}"


@contextmanager
def sluice(repository: Path, scratch: Path, transport: str, *more: str) -> Iterator[ServerProcess]:
    """`sluice serve` on this model repository and one of its transports, as a user would run it, with `more` flags."""
    port, http_port = free_port(), free_port()
    listen = [f"--grpc-port={port}", f"--http-port={http_port}", "--metrics-port=0"]
    listen.append(f"--batch-curve-cache={scratch}")  # what is measured is measured in this run
    command = [str(SLUICE), "serve", f"--transport={transport}", f"--model-repository={repository}", *listen, *more]
    with running(command, port, scratch / f"sluice-{port}.log") as process:
        yield ServerProcess(process.pid, port, http_port)


@contextmanager
def echo(scratch: Path) -> Iterator[ServerProcess]:
    """The bare grpcio server."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.echo_server", f"--port={port}"]
    with running(command, port, scratch / f"echo-{port}.log") as process:
        yield ServerProcess(process.pid, port)
