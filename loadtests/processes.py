"""Servers as processes of their own: started on a free port, waited for, measured, ended by SIGTERM."""

import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

START_TIMEOUT_S = 60.0
"""A server of demo-sized models is up in two seconds; a busy machine may need many times that."""

STOP_TIMEOUT_S = 20.0
"""After SIGTERM nothing is left to answer, so that only the interpreter has to end."""

POLL_S = 0.2
"""How long one look at a starting server takes; in between, the process is looked at."""


class ServerFailed(Exception):
    """A server under test did not start; the text ends with what it wrote."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that answers on this port, of this machine unless somebody else started it."""

    pid: int | None
    """None for one that was not started here: what it uses cannot be measured."""
    port: int
    http_port: int = 0
    """Where it answers REST, if it does."""
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        """HOST:PORT of its gRPC."""
        return f"{self.host}:{self.port}"

    @property
    def http_address(self) -> str:
        """HOST:PORT of its REST."""
        return f"{self.host}:{self.http_port}"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def sluice(repository: Path, scratch: Path, transport: str, *more: str) -> Iterator[ServerProcess]:
    """`sluice serve` on this model repository and one of its transports, as a user would run it, with `more` flags."""
    program = Path(sysconfig.get_path("scripts")) / "sluice"
    port, http_port = free_port(), free_port()
    listen = [f"--grpc-port={port}", f"--http-port={http_port}", "--metrics-port=0"]
    listen.append(f"--batch-curve-cache={scratch}")  # what is measured is measured in this run
    command = [str(program), "serve", f"--transport={transport}", f"--model-repository={repository}", *listen, *more]
    with _running(command, port, scratch / f"sluice-{port}.log") as server:
        yield replace(server, http_port=http_port)


@contextmanager
def echo(scratch: Path) -> Iterator[ServerProcess]:
    """The bare grpcio server."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.echo_server", f"--port={port}"]
    with _running(command, port, scratch / f"echo-{port}.log") as server:
        yield server


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[ServerProcess]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        if not wait_for_port(port, lambda: process.poll() is None):
            raise ServerFailed(f"{' '.join(command)} did not start:\n{log.read_text()}")
        yield ServerProcess(process.pid, port)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(port: int, is_running: Callable[[], bool]) -> bool:
    """Wait until a gRPC server answers on the port; False when it has ended or takes too long."""
    until_s = time.monotonic() + START_TIMEOUT_S
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        # Not `channel_ready_future`: its thread may look at the channel when that is closed already.
        is_live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        while is_running() and time.monotonic() < until_s:
            try:
                is_live(b"", timeout=POLL_S, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    continue
            return True
    return False
