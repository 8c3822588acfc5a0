"""What a stream of inference has in flight, and whose each answer is. Pure: the drivers send, hear and wait.

Invariants:
- Each request is settled once: by its answer, or by the end of the stream when that comes first. One that its caller
  gave up is not settled any more.
- Requests are sent in the order in which they begin, each once. None is repeated: that is for the caller to decide.
- An answer belongs to the request whose id it has. One without an id belongs to the oldest in flight, as servers
  answer a stream in the order of its requests.
- A request that was given up stays in flight until its answer comes, or that would be taken for another one's.
- When a closed stream has nothing in flight but what was given up, its call is cancelled: nobody waits for it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from sluice_client import operations
from sluice_client.errors import (
    ClientClosed,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    InvalidResponse,
    ResourceExhausted,
)
from sluice_client.flow import Flows, Metadata, Timing
from sluice_client.operations import InferArguments, Inference, Inputs
from sluice_client.results import Result
from sluice_client.retries import Failure
from sluice_client.settings import STREAM_IN_FLIGHT_MAX
from sluice_proto.grpc_service_pb2 import ModelStreamInferResponse

Settle = Callable[[Result | ClientError], None]


def check_memory(inference: Inference, endpoint: str) -> None:
    """InvalidRequest when a request goes to a server that does not know its shared memory."""
    if inference.endpoint and inference.endpoint != endpoint:
        raise InvalidRequest(
            f"the request's shared memory is registered at {inference.endpoint}, and the request would go to {endpoint}"
        )


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What holds for one stream, and for its requests where they name no deadline of their own."""

    timeout_s: float | None
    metadata: Metadata
    endpoint: int | None
    request_deadline_s: float


@dataclass(slots=True, eq=False)
class StreamedRequest:
    """A request in flight; `settle` is told what became of it, by the thread that hears the stream."""

    id: str
    inference: Inference
    started_ns: int
    settle: Settle
    given_up: bool = False


class Exchange:
    """The requests and answers of one stream. Any thread may call any method; `_lock` guards what is in flight.

    `send` puts a request's bytes on their way, and None when there are no more; it must not block. `cancel` cancels
    the call. `endpoint` is the number of the only endpoint that the stream may go to, None for any.
    """

    def __init__(
        self,
        flows: Flows,
        endpoint: int | None,
        send: Callable[[bytes | None], None],
        cancel: Callable[[], object],
        in_flight_max: int = STREAM_IN_FLIGHT_MAX,
    ) -> None:
        self._flows = flows
        self._send = send
        self._cancel = cancel
        self._in_flight_max = in_flight_max
        self._numbers = count(1)
        self._started_ns = flows.clock_ns()
        self.endpoint = flows.pick(endpoint, self._started_ns)
        self._lock = threading.Lock()
        self._in_flight: dict[str, StreamedRequest] = {}
        self._awaited = 0  # of those in flight, how many were not given up
        self._was_answered = False
        self._is_closed = False
        self._was_left = False
        self._end: Failure | ClientError | None = None

    def __repr__(self) -> str:
        where = self._flows.text_of(self.endpoint)
        if self._end is not None:
            return f"{where}; ended: {self._error(self._end, '')}"
        return f"{where}; {'closed, ' if self._is_closed else ''}{len(self._in_flight)} in flight"

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._is_closed and self._end is None

    def prepare(self, model: str, inputs: Inputs, request: InferArguments) -> tuple[Inference, str]:
        """What to begin, and the id of it: one made here when its caller has none.

        Those have one length, which the server's cache of heads likes.
        """
        request_id = request.get("request_id", "")
        if request_id == "":
            request_id = f"stream-{next(self._numbers):08x}"
        complete: InferArguments = {**request, "request_id": request_id}
        return operations.infer(model, inputs, **complete), request_id

    def begin(self, inference: Inference, request_id: str, settle: Settle) -> StreamedRequest:
        """Send a request. Raises what ended the stream, ClientClosed, InvalidRequest for an id that is in flight."""
        check_memory(inference, self._flows.text_of(self.endpoint))
        request = StreamedRequest(request_id, inference, self._flows.clock_ns(), settle)
        with self._lock:
            if self._end is not None:
                raise self._error(self._end, inference.model)
            if self._is_closed:
                raise ClientClosed("the stream is closed; open a new one")
            if request_id in self._in_flight:
                raise InvalidRequest(
                    f"request_id {request_id!r} is that of a request in flight on this stream; answers are told apart "
                    "by it, so give each its own, or none"
                )
            if len(self._in_flight) >= self._in_flight_max:
                text = f"{self._in_flight_max} requests of this stream have no answer yet: wait for some of them"
                raise ResourceExhausted(text, inference.model, self._flows.text_of(self.endpoint))
            self._in_flight[request_id] = request
            self._awaited += 1
            self._send(inference.request)
        return request

    def take(self, answer: bytes) -> None:
        """An answer came. Raises InvalidResponse when it is none, or nobody's: then the stream cannot go on."""
        message = operations.stream_answer(answer)
        now_ns = self._flows.clock_ns()
        with self._lock:
            request_id = message.infer_response.id or next(iter(self._in_flight), "")
            request = self._in_flight.pop(request_id, None)
            if request is not None and not request.given_up:
                self._awaited -= 1
            is_first, self._was_answered = not self._was_answered, True
            nobody_waits = self._nobody_waits()
        if request is None:
            raise InvalidResponse(
                f"the stream was answered for the request {request_id!r}, which is not in flight; each request has "
                "one answer (models that give several, decoupled ones, are not supported)"
            )
        if is_first:
            self._flows.learn(self.endpoint, b"", now_ns, self._started_ns)
        if nobody_waits:
            self.leave()
        if not request.given_up:
            request.settle(self._outcome(request, message, now_ns))

    def give_up(self, request: StreamedRequest) -> None:
        """Its caller waits no longer."""
        with self._lock:
            if self._in_flight.get(request.id) is request and not request.given_up:
                request.given_up = True
                self._awaited -= 1
            nobody_waits = self._nobody_waits()
        if nobody_waits:
            self.leave()

    def late(self, request: StreamedRequest, deadline_s: float) -> DeadlineExceeded:
        """What the caller is told of a request that is given up as its time is over."""
        self.give_up(request)
        text = f"no answer within {deadline_s:g} s; the request is still with the server"
        return DeadlineExceeded(text, request.inference.model, self._flows.text_of(self.endpoint))

    def close(self) -> None:
        """Take no more requests and tell the server so: it sends the answers that are due and ends the stream."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._send(None)
            nobody_waits = self._nobody_waits()
        if nobody_waits:
            self.leave()

    def leave(self) -> None:
        """Cancel the call: who still waits is told that the stream was closed."""
        self._was_left = True
        self._cancel()

    def end(self, how: Failure | ClientError | None) -> None:
        """The stream is over: with a status other than OK, for a reason on this side, or with OK (None)."""
        with self._lock:
            left = list(self._in_flight.values())
            self._in_flight.clear()
            self._awaited = 0
            if self._was_left and isinstance(how, Failure):
                how = ClientClosed("the stream was closed before the answer came")
            elif how is None and (left or not self._is_closed):
                how = InvalidResponse("the server ended the stream with status OK and without all of its answers")
            self._end = how or ClientClosed("the stream is closed; open a new one")
            if not self._is_closed:
                self._send(None)
        if not isinstance(how, ClientClosed):
            outcome = how if isinstance(how, Failure) else b""
            self._flows.learn(self.endpoint, outcome, self._flows.clock_ns(), self._started_ns)
        for request in left:
            if not request.given_up:
                request.settle(self._error(self._end, request.inference.model))

    def _nobody_waits(self) -> bool:
        return self._is_closed and self._end is None and bool(self._in_flight) and not self._awaited

    def _outcome(
        self, request: StreamedRequest, message: ModelStreamInferResponse, now_ns: int
    ) -> Result | ClientError:
        failure = operations.stream_failure(message)
        if failure is not None:
            return self._flows.error(failure, request.inference.model, self.endpoint)
        timing = Timing(now_ns - request.started_ns, 1, self._flows.text_of(self.endpoint))
        try:
            return operations.result_of(message.infer_response, timing, request.inference.rooms)
        except (InvalidResponse, InvalidRequest) as error:  # the latter when its shared memory was closed meanwhile
            return error

    def _error(self, how: Failure | ClientError, model: str) -> ClientError:
        """The end of the stream as an exception; one for each who is told, as raising one changes it."""
        if isinstance(how, Failure):
            return self._flows.error(how, model, self.endpoint)
        return type(how)(*how.args)
