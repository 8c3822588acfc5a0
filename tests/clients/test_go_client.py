"""A client in Go (clients/go), whose gRPC is not the C core that Python's is: built once, run on every transport."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trustme

from sluice_server.observability.statistics import Outcome
from sluice_server.transport.options import Compression, TlsFiles, TransportOptions
from support import models
from support.fakes import PATIENCE_S, eventually, held
from support.requests import infer_request
from support.server import LOOPBACK, RunningServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sluice_server.execution.model import ServedModel

SOURCES = Path(__file__).parent / "go"

BUILD_TIMEOUT_S = 600.0
"""The modules' download and their first build, which takes 40 s of one core; later ones take a second of Go's cache."""

LARGE_BYTES = 3 << 20
"""As in main.go."""

PARALLEL_CALLS = 64
STREAMED = 20

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program; skipped where there is no Go, or no way to its modules. With CI=true the latter is a failure."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed, which builds the client in tests/clients/go")
    environ = {**os.environ, "GOFLAGS": "-mod=readonly"}
    environ.pop("XDG_CACHE_HOME", None)  # the tests' own is empty each time, and Go's knows what it has built
    got = subprocess.run(
        [go, "mod", "download"], cwd=SOURCES, env=environ, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    )
    if got.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"go cannot get the modules of tests/clients/go: {got.stderr}")
    program = tmp_path_factory.mktemp("go") / "client"
    built = subprocess.run(
        [go, "build", "-buildvcs=false", "-o", program, "."],
        cwd=SOURCES,
        env=environ,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    assert built.returncode == 0, got.stderr + built.stderr
    return program


class Talk:
    """The program at its work: its lines of facts, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def hear(self) -> dict[str, Any]:
        """The next line; AssertionError when the program has failed. The program itself bounds the time."""
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()
        facts: dict[str, Any] = json.loads(line)
        return facts

    def say(self) -> None:
        """Send a line."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Wait for its end, in which it has nothing more to tell."""
        rest, errors = self._process.communicate(timeout=PATIENCE_S)
        assert (self._process.returncode, rest, errors) == (0, "", "")


@contextmanager
def talking(client: Path, *arguments: str) -> Iterator[Talk]:
    """The program with these arguments; it must end well by itself."""
    pipe = subprocess.PIPE
    with subprocess.Popen([client, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            talk = Talk(process)
            yield talk
            talk.end()
        finally:
            process.kill()


def ask(client: Path, *arguments: str) -> dict[str, Any]:
    """The facts of a check that tells them in one line."""
    with talking(client, *arguments) as talk:
        return talk.hear()


@pytest.fixture
def start(start_server, repository):
    """Start a server of the model that the program calls."""
    models.write_model(repository, "echo", models.identity(dims=("N", "M")), max_batch_size=8)

    def begin(options: TransportOptions | None = None) -> RunningServer:
        changes = {"grpc": options} if options else {}
        server: RunningServer = start_server(repository, http=None, metrics=None, **changes)
        return server

    return begin


@pytest.fixture
def server(start) -> RunningServer:
    return start()


def test_go_sees_the_health_of_the_server_and_of_each_model(client, server):
    assert ask(client, server.target, "health") == {"": "SERVING", "echo": "SERVING", "nope": "NotFound"}


def test_go_watches_a_server_until_it_stops(client, server):
    with talking(client, server.target, "watch") as talk:
        assert talk.hear() == {"status": "SERVING"}
        server.server.stop()
        assert talk.hear() == {"status": "NOT_SERVING"}
        assert talk.hear() == {"code": "OK"}


def test_go_learns_the_whole_protocol_by_reflection(client, server):
    facts = ask(client, server.target, "reflection")
    assert {"grpc.health.v1.Health", "inference.GRPCInferenceService"} <= set(facts["services"])
    assert facts["methods"] > 10


def test_go_asks_whether_the_server_lives(client, server):
    assert ask(client, server.target, "live") == {"live": True}


def test_go_infers_with_raw_contents_and_a_deadline(client, server):
    assert ask(client, server.target, "infer") == {"id": "first", "model_name": "echo", "model_version": "1"}


def test_go_sends_and_gets_many_times_its_window(client, server):
    assert ask(client, server.target, "large") == {"bytes": LARGE_BYTES}


def test_go_compresses_its_request(client, server):
    facts = ask(client, server.target, "gzip")
    assert facts["encoding"] == ""
    assert facts["sent_compressed"] < facts["sent"] / 10
    assert facts["received_compressed"] == facts["received"] > LARGE_BYTES


def test_go_gets_a_compressed_answer(client, start):
    options = TransportOptions(f"{LOOPBACK}:0", compression=Compression.LOW)
    facts = ask(client, start(options).target, "gzip")
    assert facts["encoding"] == "gzip"
    assert facts["received_compressed"] < facts["received"] / 10
    assert facts["received"] > LARGE_BYTES


def test_go_makes_many_calls_at_once_on_one_connection(client, server):
    assert ask(client, server.target, "parallel") == {"calls": PARALLEL_CALLS}
    outcomes = server.model("echo").statistics.snapshot().outcomes
    assert outcomes[Outcome.OK] == PARALLEL_CALLS


def test_go_streams_and_hears_answers_and_errors_in_order(client, server):
    heard = ask(client, server.target, "stream")["heard"]
    assert len(heard) == STREAMED
    for i, told in enumerate(heard):
        if i in (2, 12):
            assert "'nope' is not found" in told
        else:
            assert told == f"{i}: {i}"


def test_go_gets_the_text_of_an_error(client, server):
    facts = ask(client, server.target, "error")
    assert facts["code"] == "NotFound"
    assert "'nö 100%' is not found" in facts["message"]


@pytest.fixture
def busy(server) -> Iterator[ServedModel]:
    """The model, at work on one request until the end of the test: what comes now waits in its queue."""
    model = server.model("echo")
    with held(model) as session:
        first = server.begin("ModelInfer", infer_request("echo", {"X": np.zeros((1, 4), np.float32)}))
        session.wait_for_runs(1)
        yield model
    first.result()


def test_what_go_waits_for_too_long_leaves_the_queue(client, server, busy):
    assert ask(client, server.target, "deadline")["code"] == "DeadlineExceeded"
    # Go resets the stream at its deadline, and the server has a clock of its own: either may be first.
    ended = busy.statistics.snapshot
    late = (Outcome.QUEUE_TIMEOUT, Outcome.CANCELLED)
    eventually(lambda: sum(ended().outcomes[outcome] for outcome in late) == 1, "it is counted")
    assert len(busy.queue) == 0


def test_what_go_cancels_leaves_the_queue(client, server, busy):
    with talking(client, server.target, "cancel") as talk:
        eventually(lambda: len(busy.queue) == 1, "Go's call waits")
        talk.say()
        assert talk.hear()["code"] == "Canceled"
    eventually(lambda: busy.statistics.snapshot().outcomes[Outcome.CANCELLED] == 1, "it is counted")
    assert len(busy.queue) == 0


def test_go_connects_by_tls(client, start, tmp_path):
    authority, files = trustme.CA(), TlsFiles(tmp_path / "certificate.pem", tmp_path / "key.pem")
    leaf = authority.issue_cert(LOOPBACK)
    leaf.cert_chain_pems[0].write_to_path(files.certificate)
    leaf.private_key_pem.write_to_path(files.key)
    authority.cert_pem.write_to_path(tmp_path / "roots.pem")
    server = start(TransportOptions(f"{LOOPBACK}:0", tls=files))
    assert ask(client, "-roots", str(tmp_path / "roots.pem"), server.target, "live") == {"live": True}


def test_go_connects_by_a_unix_socket(client, start, tmp_path):
    server = start(TransportOptions(f"unix:{tmp_path / 'socket'}"))
    assert ask(client, server.target, "live") == {"live": True}
