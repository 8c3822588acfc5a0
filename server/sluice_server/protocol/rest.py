"""The REST protocol, whatever serves it: from an HTTP request to calls of the seam, and from their ends to an answer.

A front (an HTTP server) makes an `Exchange` of each request that it has read whole, and gives it to `Rest.take`. What
that names becomes a `RestCall`, a call like that of any transport: it goes through the same dispatcher, checks, queues,
statistics and traces. `Rest.flush` hands up what has been taken. Both are for the front's one thread.
"""

from __future__ import annotations

import collections
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from sluice_batching import NO_DEADLINE
from sluice_server.errors import Unavailable
from sluice_server.observability.statistics import Outcome
from sluice_server.protocol import rest_infer, rest_json, rest_routes
from sluice_server.protocol.openapi import describe
from sluice_server.protocol.rpcs import path_of
from sluice_server.retry_after import retry_after_s
from sluice_server.status import HTTP_CODES, Code, Status
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_server.protocol.rest_infer import OutputForms
    from sluice_server.protocol.rest_routes import Endpoint, Names, Route
    from sluice_server.repository.manager import ModelManager
    from sluice_server.security.restrictions import Restriction
    from sluice_server.status import StatusMapper
    from sluice_server.transport.call import Handler, Metadata

HEAD_LENGTH = "inference-header-content-length"
"""The header that says how long the JSON before the binary tensors is."""

_JSON = ("content-type", "application/json")
_BINARY = ("content-type", "application/octet-stream")


class HttpAnswer(NamedTuple):
    """An answer for a front to send; it adds the length, and compresses the body where that is asked for."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    parts: Sequence[Buffer] = ()
    compressible: bool = False


class Exchange(ABC):
    """One HTTP request that was read whole, decompressed, as its front owns it."""

    __slots__ = ("body", "headers", "left", "path", "peer", "received_ns", "verb")

    verb: str
    path: str
    """As it was sent: percent-encoded, without the query."""
    headers: Mapping[str, str]
    """By lower-case names."""
    body: bytes
    peer: str
    """As of a call, e.g. `ipv4:127.0.0.1:4711`."""
    received_ns: int
    left: Callable[[], None] | None
    """To be called by the front, on its thread, when the client went away before the answer."""

    @abstractmethod
    def answer(self, answer: HttpAnswer) -> None:
        """End the exchange; on the front's thread, once."""

    @abstractmethod
    def resume(self, step: Callable[[], None]) -> None:
        """Have a step called on the front's thread, in the order of the calls; from any thread."""


class RestCall(Call):
    """One REST request, as the rest of the server sees it."""

    __slots__ = ("_codes", "_ended", "_exchange", "_render", "_rest")

    front = "HTTP"
    """For its trace."""

    def __init__(
        self,
        rest: Rest,
        exchange: Exchange,
        rpc: str,
        message: bytes,
        render: Callable[[Sequence[Buffer]], HttpAnswer],
        endpoint: Endpoint,
    ) -> None:
        """`render` makes the answer of the parts of the RPC's response."""
        self.method = path_of(rpc)
        self.message = message
        self.received_ns = exchange.received_ns
        self.deadline_ns = NO_DEADLINE
        self.on_cancel = None
        self._rest = rest
        self._exchange = exchange
        self._render = render
        self._codes = endpoint.codes
        self._ended = False
        exchange.left = self._leave

    def __repr__(self) -> str:
        return f"<RestCall {self.method} {'ended' if self._ended else 'open'}>"

    @property
    def metadata(self) -> Metadata:
        """The request's headers."""
        return tuple(self._exchange.headers.items())

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._exchange.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        """None: there is no TLS here."""
        return ()

    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with the RPC's response; it becomes JSON on the front's thread, which holds no model up."""
        self._exchange.resume(partial(self._end, parts, None))

    def fail(self, status: Status) -> None:
        """End the call with an error."""
        self._exchange.resume(partial(self._end, (), status))

    def _end(self, parts: Sequence[Buffer], status: Status | None) -> None:
        if self._ended:
            return
        if status is None:
            try:
                answer = self._render(parts)
            except Exception as error:
                status = self._rest.to_status(error)
        if status is not None:
            answer = refusal(status, self._codes)
        self._close(Code.OK if status is None else status.code)
        self._exchange.answer(answer)

    def _leave(self) -> None:
        if self._ended:
            return
        on_cancel = self.on_cancel
        self._close(self.code_of_leaving(time.monotonic_ns()))
        if on_cancel is not None:
            on_cancel()

    def _close(self, code: Code) -> None:
        self._ended = True
        # Both lead back to the call: without them memory is freed at once, and not by the collector.
        self.on_cancel = None
        self._exchange.left = None
        self._rest.count(self.method, code)


class Rest:
    """Takes exchanges, and gives the calls that they are to `handler`, in lists."""

    def __init__(
        self,
        handler: Handler,
        manager: ModelManager,
        to_status: StatusMapper,
        version: str,
        restricted: Mapping[str, Restriction] | None = None,
    ) -> None:
        """`restricted` is by the names of RPCs."""
        self._restricted = restricted or {}
        self.to_status = to_status
        self._handler = handler
        self._manager = manager
        self._routes = rest_routes.routes()
        self._description = rest_json.dumps(describe(version, self._routes.routes))
        self._requests = rest_infer.InferRequests()
        self._answers = rest_infer.InferAnswers()
        self._taken: list[Call] = []
        self._outcomes: collections.Counter[tuple[str, Code]] = collections.Counter()
        self._stopping = False

    def stop(self) -> None:
        """Refuse new inference: the server is ending."""
        self._stopping = True

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each RPC, by its path, have ended with each code."""
        return dict(self._outcomes)

    def count(self, method: str, code: Code) -> None:
        """Note the end of a call."""
        self._outcomes[method, code] += 1

    def take(self, exchange: Exchange) -> None:
        """Answer an exchange, or note the call that it is for `flush`; never raises."""
        found = self._routes.find(exchange.path)
        if found is None:
            exchange.answer(plain_error(404, "Not Found"))
            return
        route, names = found
        endpoint = route.endpoints.get("GET" if exchange.verb == "HEAD" else exchange.verb)
        if endpoint is None:
            exchange.answer(_wrong_verb(route))
        elif self._restricted and not self._admits(exchange, endpoint.rpc):
            pass
        elif endpoint.rpc is None:
            exchange.answer(HttpAnswer(200, (_JSON,), (self._description,)))
        else:
            self._take(exchange, endpoint, endpoint.rpc, names)

    def _admits(self, exchange: Exchange, rpc: str | None) -> bool:
        """Let an exchange pass, or refuse it as Triton does; the description goes with the server's metadata."""
        restriction = self._restricted.get(rpc or "ServerMetadata")
        if restriction is None or restriction.admits(exchange.headers.items()):
            return True
        status = Status(Code.PERMISSION_DENIED, restriction.refusal)
        if rpc is not None:
            self.count(path_of(rpc), status.code)
        exchange.answer(refusal(status))
        return False

    def flush(self) -> None:
        """Hand up the calls that were taken since the last time."""
        calls, self._taken = self._taken, []
        if calls:
            self._handler(calls)

    def _take(self, exchange: Exchange, endpoint: Endpoint, rpc: str, names: Names) -> None:
        try:
            if endpoint is rest_routes.INFER:
                message, forms = self._read(exchange, names)
                call = RestCall(self, exchange, rpc, message, partial(self._render_inference, forms), endpoint)
            else:
                message = endpoint.request(names, exchange.body).SerializeToString()
                call = RestCall(self, exchange, rpc, message, partial(_render, endpoint), endpoint)
        except Exception as error:
            status = self.to_status(error)
            self.count(path_of(rpc), status.code)
            exchange.answer(refusal(status, endpoint.codes))
        else:
            self._taken.append(call)

    def _read(self, exchange: Exchange, names: Names) -> tuple[bytes, OutputForms]:
        if self._stopping:
            raise Unavailable("the server is shutting down")
        version = names.get("version", "")
        model = self._manager.find(names["model"], version)
        try:
            return self._requests.read(model.interface, version, exchange.body, exchange.headers.get(HEAD_LENGTH))
        except Exception:
            model.statistics.record_refused(Outcome.INVALID)
            raise

    def _render_inference(self, forms: OutputForms, parts: Sequence[Buffer]) -> HttpAnswer:
        head, tensors, is_binary = self._answers.write(parts, forms)
        headers = (_BINARY, (HEAD_LENGTH, str(len(head)))) if is_binary else (_JSON,)
        return HttpAnswer(200, headers, (head, *tensors), compressible=True)


def _render(endpoint: Endpoint, parts: Sequence[Buffer]) -> HttpAnswer:
    assert endpoint.response is not None
    status, value = endpoint.answer(endpoint.response.FromString(b"".join(parts)))
    return HttpAnswer(status) if value is rest_routes.EMPTY else HttpAnswer(status, (_JSON,), (rest_json.dumps(value),))


def _wrong_verb(route: Route) -> HttpAnswer:
    allowed = [*route.endpoints, *(["HEAD"] if "GET" in route.endpoints else [])]
    return plain_error(405, "Method Not Allowed", ("allow", ", ".join(allowed)))


def refusal(status: Status, codes: Mapping[Code, int] | None = None) -> HttpAnswer:
    """The answer to a call that has failed; `codes` come before the table."""
    code = {**HTTP_CODES, **codes}[status.code] if codes else HTTP_CODES[status.code]
    wait_s = retry_after_s(status.trailers)
    return plain_error(code, status.message, *(() if wait_s is None else (("retry-after", str(wait_s)),)))


def plain_error(code: int, text: str, *headers: tuple[str, str]) -> HttpAnswer:
    """An answer with Triton's error body."""
    # A text may repeat what a client wrote, half of a surrogate pair too, which JSON in UTF-8 cannot hold.
    clean = text.encode(errors="replace").decode()
    return HttpAnswer(code, (_JSON, *headers), (rest_json.dumps({"error": clean}),))
