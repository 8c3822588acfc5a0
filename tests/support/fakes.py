"""Fakes that are passed in: calls and streams that record their ends, and a session that holds every run."""

from __future__ import annotations

import functools
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from sluice_batching import NO_DEADLINE, BatchQueue, QueuePolicy
from sluice_proto.model_config_pb2 import DataType, ModelConfig
from sluice_server.execution.cached import CachedModel, CachingRunner
from sluice_server.execution.instance import BatchRunner, Instance
from sluice_server.execution.model import ServedModel
from sluice_server.execution.model_cache import ModelCache
from sluice_server.execution.ordering import ORDERED, OrderedAnswers
from sluice_server.observability.statistics import ModelStatistics
from sluice_server.protocol.dispatch import INFER, STREAM_INFER
from sluice_server.protocol.encode import Encoder
from sluice_server.protocol.interface import ModelInterface
from sluice_server.status import OK, Status, StatusMapper
from sluice_server.transport.call import Call
from sluice_server.transport.turns import MessageInTurn, StreamInTurn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import grpc
    from google.protobuf.message import Message
    from typing_extensions import Buffer

    from sluice_batching import ExpiryTimer
    from sluice_server.execution.instance import Runnable
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.response_cache import ResponseCache
    from sluice_server.transport.call import Metadata
    from support.server import RunningServer

PATIENCE_S = 20.0
"""Longer than anything here takes on a loaded machine; past it the test has failed."""

POLL_S = 0.001


class RecordingCall(Call):
    """A call without a transport: every end that it is given, in order. The first one releases `wait`."""

    __slots__ = ("_ended", "_metadata", "_peer", "ends")

    def __init__(
        self,
        message: bytes | None = b"",
        method: str = INFER,
        *,
        deadline_ns: int = NO_DEADLINE,
        metadata: Metadata = (),
        peer: str = "ipv4:127.0.0.1:1",
    ) -> None:
        self.method = method
        self.message = message
        self.received_ns = time.monotonic_ns()
        self.deadline_ns = deadline_ns
        self.on_cancel: Callable[[], None] | None = None
        self.ends: list[tuple[Status, bytes]] = []
        self._ended = threading.Event()
        self._metadata = metadata
        self._peer = peer

    def __repr__(self) -> str:
        return f"<RecordingCall {self.method} {[str(status.code) for status, _ in self.ends]}>"

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        return ()

    def reply(self, parts: Sequence[Buffer]) -> None:
        self._end(OK, b"".join(parts))

    def fail(self, status: Status) -> None:
        self._end(status, b"")

    def _end(self, status: Status, payload: bytes) -> None:
        self.ends.append((status, payload))
        self._ended.set()

    def wait(self) -> tuple[Status, bytes]:
        """The first end; AssertionError when none comes."""
        assert self._ended.wait(PATIENCE_S), "the call was not ended"
        return self.ends[0]


class RecordingStream(StreamInTurn):
    """A stream without a transport: everything that is sent, and every end that it is given, in order."""

    __slots__ = ("_metadata", "ends", "sent")

    def __init__(self, method: str = STREAM_INFER, *, metadata: Metadata = ()) -> None:
        super().__init__()
        self.method = method
        self.deadline_ns = NO_DEADLINE
        self.sent: list[bytes] = []
        self.ends: list[Status] = []
        self._metadata = metadata

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    @property
    def peer_names(self) -> tuple[str, ...]:
        return ()

    def message(self, message: bytes | None) -> MessageInTurn:
        """A message of this stream, as a transport hands it up."""
        return MessageInTurn(self, message, time.monotonic_ns())

    def send(self, parts: Sequence[Buffer]) -> None:
        assert not self.ends, "the stream has ended"
        self.sent.append(b"".join(parts))

    def finish(self, status: Status = OK) -> None:
        self.ends.append(status)


class HeldSession:
    """A session that holds every run until `release`; `runs` are the feeds of all runs that have begun, in order."""

    def __init__(self, session: Runnable) -> None:
        self._session = session
        self._changed = threading.Condition()
        self._released = False
        self.runs: list[dict[str, np.ndarray]] = []

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with self._changed:
            self.runs.append(feeds)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._released, PATIENCE_S), "the run was not released"
        return self._session.run(output_names, feeds)

    def wait_for_runs(self, count: int) -> None:
        """Wait until `count` runs have begun since the start."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.runs) >= count, PATIENCE_S), f"{len(self.runs)} runs began"

    def release(self) -> None:
        """Let all held runs, and all later ones, go on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()


class EchoSession:
    """A session without ONNX Runtime: every output is a copy of the only input."""

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        (array,) = feeds.values()
        return [array.copy() for _ in output_names]


def served_model(
    session: Runnable,
    timer: ExpiryTimer,
    name: str = "fake",
    *,
    max_batch_rows: int = 8,
    instances: int = 1,
    cache: ResponseCache | None = None,
    ordered: bool = False,
    clock: Callable[[], int] = time.monotonic_ns,
    **policy: int,
) -> ServedModel:
    """A model of one input X and one output Y, both INT64 with one element a row, run by a fake session. Not started.

    `policy` are fields of QueuePolicy. With a cache it is a CachedModel, whose lookups are timed by the clock; when it
    is `ordered`, its answers leave in order.
    """
    config = ModelConfig(name=name, max_batch_size=max_batch_rows)
    config.input.add(name="X", data_type=DataType.TYPE_INT64, dims=[1])
    config.output.add(name="Y", data_type=DataType.TYPE_INT64, dims=[1])
    interface = ModelInterface.of(config, 1)
    rules = QueuePolicy(max_batch_rows=max(1, max_batch_rows), batching=max_batch_rows > 0, **policy)
    queue: BatchQueue[InferRequest] = BatchQueue(rules)
    statistics, to_status, encoder = ModelStatistics(caches=cache is not None), StatusMapper(), Encoder(interface)
    make_model: Callable[..., ServedModel] = ServedModel
    if cache is None:
        runner = BatchRunner(encoder, statistics, to_status, has_batch_dimension=max_batch_rows > 0)
    else:
        make_model = CachedModel
        model_cache = ModelCache(cache, interface, queue, BatchQueue(rules), statistics, clock)
        runner = CachingRunner(encoder, statistics, to_status, model_cache, has_batch_dimension=max_batch_rows > 0)
    if ordered:
        order = OrderedAnswers(rules)
        runner.keep_order(order)
        make_model = functools.partial(ORDERED[make_model], order=order)  # type: ignore[index] # it is a class here
    threads = [Instance(f"{name}-{number}", queue, session, runner) for number in range(instances)]
    return make_model(config, interface, queue, threads, runner, statistics, to_status, timer, properties={})


@contextmanager
def held(model: ServedModel) -> Iterator[HeldSession]:
    """Hold every run of a served model from now on; all of its instances share the session. Released at the end."""
    instances = model._instances
    originals = [instance._session for instance in instances]
    session = HeldSession(originals[0])
    for instance in instances:
        instance._session = session
    common = model._common_session
    model._common_session = None if common is None else session
    spares, model._spare_watches = model._spare_watches, []
    try:
        yield session
    finally:
        session.release()
        model._common_session = common
        model._spare_watches = spares
        for instance, original in zip(instances, originals, strict=True):
            instance._session = original


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for a state that nothing announces; AssertionError, which says `what`, when it does not come."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"did not happen: {what}"
        threading.Event().wait(POLL_S)


def run_together(
    server: RunningServer, model: str, first: Message, requests: Sequence[Message]
) -> tuple[list[grpc.Future], list[dict[str, np.ndarray]]]:
    """Calls that wait while `first` runs, and the feeds of the runs that they share, once those are over."""
    served = server.model(model)
    with held(served) as session:
        running = server.begin("ModelInfer", first)
        session.wait_for_runs(1)
        calls: list[grpc.Future] = []
        for each in requests:
            calls.append(server.begin("ModelInfer", each))
            eventually(lambda: len(served.queue) == len(calls), "it waits")
        session.release()
        running.result()
        for call in calls:
            call.exception()
    return calls, session.runs[1:]
