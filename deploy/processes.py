"""Servers as processes of their own: started on a free port, waited for, ended by SIGTERM."""

import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import grpc

SLUICE: Final = Path(sysconfig.get_path("scripts")) / "sluice"
"""The command, as it is installed beside this Python."""

LOOPBACK: Final = "127.0.0.1"

START_TIMEOUT_S: Final = 60.0
"""A server of demo-sized models is up in two seconds; a busy machine may need many times that."""

STOP_TIMEOUT_S: Final = 40.0
"""What was accepted gets 30 seconds after SIGTERM by default."""

POLL_S: Final = 0.2
"""How long one look at a starting server takes; in between, the process is looked at."""


class ServerFailed(Exception):
    """A server did not start; the text has its command, and ends with what it wrote where that is kept."""


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str], port: int, log: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A gRPC server while the block runs, which answers on this port of the loopback; ServerFailed if it does not.

    What it writes goes to `log`, or else to where we write.
    """
    with nullcontext() if log is None else log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603 - our own
    try:
        if not wait_for_port(port, lambda: process.poll() is None):
            wrote = "; what it says is above" if log is None else f":\n{log.read_text()}"
            raise ServerFailed(f"{' '.join(command)} did not start{wrote}")
        yield process
    finally:
        process.terminate()
        wait_or_kill(process, STOP_TIMEOUT_S)


def wait_for_port(port: int, is_running: Callable[[], bool]) -> bool:
    """Wait until a gRPC server answers on the port; False when it has ended or takes too long."""
    until_s = time.monotonic() + START_TIMEOUT_S
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
    with grpc.insecure_channel(f"{LOOPBACK}:{port}", options) as channel:
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


def wait_or_kill(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Wait for the end of a process that was asked for it, and bring that about when it takes longer."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
