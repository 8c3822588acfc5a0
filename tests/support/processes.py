"""`sluice serve` as a process of its own: started on free ports, its log read line by line, ended by signals."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deploy.processes import SLUICE, START_TIMEOUT_S
from support.fakes import eventually

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator

FREE_PORTS = ("--grpc-port=0", "--http-port=0", "--metrics-port=0")
LOOPBACK = ("--grpc-address=127.0.0.1", "--http-address=127.0.0.1")


class ServeProcess:
    """A running `sluice serve` with JSON logs; every line that it writes to standard error must be one record."""

    def __init__(self, *flags: str) -> None:
        command = [str(SLUICE), "serve", *FREE_PORTS, *LOOPBACK, "--log-format=json", *flags]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
        self._changed = threading.Condition()
        self._closed = False
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._changed:
                self.lines.append(line.decode())
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was logged; a line that is no JSON fails the test."""
        return [json.loads(line) for line in self.lines]

    def messages(self) -> list[str]:
        return [record["message"] for record in self.records]

    def wait_for(self, message: str) -> dict[str, Any]:
        """The first record with this message; AssertionError when the process ends without it."""
        with self._changed:
            self._changed.wait_for(lambda: message in self.messages() or self._closed, START_TIMEOUT_S)
            assert message in self.messages(), self.lines
        return next(record for record in self.records if record["message"] == message)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status; everything that was written has been read by then."""
        code = self._process.wait(START_TIMEOUT_S)
        self._reader.join(START_TIMEOUT_S)
        return code

    def stdout(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read().decode()

    def close(self) -> None:
        self._process.kill()
        self.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def serve(*flags: str) -> Iterator[ServeProcess]:
    """A server process, killed at the end if it has not ended by then."""
    process = ServeProcess(*flags)
    try:
        yield process
    finally:
        process.close()


class Addresses:
    """Where a server is, read from its readiness line."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self.grpc: str = ready["grpc"]
        self.http = f"http://127.0.0.1:{ready['http']}"
        self.metrics = f"http://127.0.0.1:{ready['metrics']}/metrics"

    def http_status(self, path: str) -> int:
        """The HTTP status of a GET; 0 when nobody listens any more."""
        try:
            with urllib.request.urlopen(self.http + path, timeout=START_TIMEOUT_S) as answer:
                status: int = answer.status
                return status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def pending(self, model: str) -> int:
        """Requests of a model that are accepted and do not run yet."""
        with urllib.request.urlopen(self.metrics, timeout=START_TIMEOUT_S) as answer:
            text = answer.read().decode()
        start = f'nv_inference_pending_request_count{{model="{model}",'
        return next(int(line.split()[-1]) for line in text.splitlines() if line.startswith(start))

    def wait_for_pending(self, model: str, count: int) -> None:
        eventually(lambda: self.pending(model) == count, f"{count} requests of {model} wait")


def seconds_since(begun_s: float) -> float:
    return time.monotonic() - begun_s
