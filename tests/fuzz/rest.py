"""Fuzzed here: requests of REST, from verb, path and header to the JSON head and the binary tail behind it."""

from __future__ import annotations

import base64
import json
import queue
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from fuzz import serving
from fuzz.mutators import change_json
from fuzz.serving import NO_ROOM, PICKY, Serving, check_at_rest, check_good
from protocol.any_requests import requests
from protocol.any_rest_heads import HEADS, VALUES
from protocol.rest_form import body_of, path_of
from sluice_server.protocol.rest import HEAD_LENGTH, Exchange
from support.fakes import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from random import Random

    from fuzz.mutators import Mutate
    from sluice_server.protocol.rest import HttpAnswer

STATUSES = frozenset((200, 400, 404, 405, 501, 503, 504))
"""What a request may be answered with. 503: load and unload outside mode explicit, and a log format (Triton's)."""

MALFORMED = (
    "failed to parse the request JSON buffer",
    "Unable to parse '",
    "Unable to open shared memory region",
    NO_ROOM,
)
"""How the texts of a 500 begin that Triton gives for broken JSON, and for regions of no use."""


class FuzzExchange(Exchange):
    """A request of HTTP that was read whole, and every answer that it is given."""

    __slots__ = ("answers", "steps")

    def __init__(self, verb: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.verb, self.path, self.headers, self.body = verb, path, headers, body
        self.peer = "ipv4:127.0.0.1:1"
        self.received_ns = time.monotonic_ns()
        self.left = None
        self.answers: list[HttpAnswer] = []
        self.steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def answer(self, answer: HttpAnswer) -> None:
        self.answers.append(answer)

    def resume(self, step: Callable[[], None]) -> None:
        self.steps.put(step)


def pack(verb: str, path: str, head_length: str, body: bytes) -> bytes:
    """An input: a line of the verb, the path and the header, `-` for none, and then the body."""
    return f"{verb} {path} {head_length}\n".encode() + body


def unpack(data: bytes) -> FuzzExchange:
    """The request that an input is, whatever bytes it has."""
    line, _, body = data.partition(b"\n")
    verb, _, rest = line.decode("latin-1").partition(" ")
    path, _, head_length = rest.rpartition(" ")
    headers = {} if head_length == "-" else {HEAD_LENGTH: head_length}
    return FuzzExchange(verb, path, headers, body)


def change_request(data: bytes, random: Random, mutate: Mutate) -> bytes:
    """Change the head, the tail or anything; the header says most often how long the head is then."""
    line, _, body = data.partition(b"\n")
    start, _, head_length = line.rpartition(b" ")
    size = int(head_length) if head_length.isdigit() and len(head_length) < 5 else len(body)
    head, tail = body[:size], body[size:]
    match random.randrange(8):
        case 0:
            return mutate(data)
        case 1 if tail:
            tail = mutate(tail)
        case 2:
            start = mutate(start).replace(b"\n", b" ")
        case _:
            head = change_json(head, random, mutate)
    if head_length.isdigit() and random.randrange(8):
        head_length = b"%d" % len(head)
    return start + b" " + head_length + b"\n" + head + tail


@dataclass
class Rests:
    """Requests of REST through the front's seam, and on to the models."""

    serving: Serving

    def check(self, data: bytes) -> None:
        """One request has one answer: of a status that is the client's, and JSON unless it is binary."""
        exchange = unpack(data)
        self.serving.rest.take(exchange)
        self.serving.rest.flush()
        while not exchange.answers:
            exchange.steps.get(timeout=PATIENCE_S)()
        while not exchange.steps.empty():
            exchange.steps.get()()
        (answer,) = exchange.answers
        judge_answer(exchange, answer)

    def look(self) -> None:
        """A good request is answered over both protocols, regions are forgotten, and the queues are empty."""
        for kind in ("system", "cuda"):
            self.check(pack("POST", f"/v2/{kind}sharedmemory/unregister", "-", b""))
        eventually(lambda: not self.serving.gpu.times_open, "the memory of the GPU is let go")
        exchange = unpack(rest_seeds()[0])
        self.serving.rest.take(exchange)
        self.serving.rest.flush()
        exchange.steps.get(timeout=PATIENCE_S)()
        assert [answer.status for answer in exchange.answers] == [200]
        check_good(self.serving)
        check_at_rest(self.serving.manager.served())


def judge_answer(exchange: FuzzExchange, answer: HttpAnswer) -> None:
    """An error says what is wrong; an answer is JSON, as long as its header says, or nothing."""
    body = b"".join(answer.parts)
    headers = dict(answer.headers)
    if answer.status == 500:
        text = json.loads(body)["error"]
        assert text.startswith(MALFORMED) or (PICKY in exchange.path and text.startswith("onnx runtime error")), text
    allowed = {*STATUSES, 429} if "sharedmemory" in exchange.path else STATUSES  # 429: all of what may be registered is
    assert answer.status in allowed or answer.status == 500, (answer.status, body)
    if answer.status != 200:
        assert not body or json.loads(body)["error"]
        return
    head = body[: int(headers.get(HEAD_LENGTH, len(body)))]
    if headers:
        json.loads(head)


def rest_seeds() -> list[bytes]:
    """The good requests, binary and as JSON, and every other path."""
    found = []
    for request in serving.good_requests():
        if not any(tensor.HasField("contents") for tensor in request.inputs):
            head, tail = body_of(request)
            found.append(pack("POST", path_of(request), str(len(head)), head + tail))
    numbers = [[*range(16)], [*range(16)]]
    inputs = [{"name": f"INPUT{i}", "datatype": "INT32", "shape": [2, 16], "data": numbers} for i in range(2)]
    outputs = [{"name": "OUTPUT0", "parameters": {"classification": 2}}, {"name": "OUTPUT1"}]
    wishes: list[dict[str, Any]] = [{}, {"outputs": outputs}, {"parameters": {"binary_data_output": True}, "id": "7"}]
    bodies = [json.dumps({"inputs": inputs, **more}).encode() for more in wishes]
    found += [pack("POST", "/v2/models/simple/infer", "-", body) for body in bodies]
    text = {"inputs": [{"name": "X", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b\u00e9"]}]}
    found.append(pack("POST", "/v2/models/text/versions/1/infer", "-", json.dumps(text).encode()))
    found.append(pack("POST", "/v2/models/any/infer", "0", bytes(16)))
    return [*found, *(pack(verb, path, "-", body) for verb, path, body in OTHERS)]


_REGION = b'{"key": "/nope", "offset": 0, "byte_size": 8}'
_HANDLE = base64.b64encode(serving.GPU_HANDLE)
_GPU_REGION = b'{"raw_handle": {"b64": "%s"}, "device_id": 0, "byte_size": 8}' % _HANDLE
_TRACES = b'{"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_count": null}'
OTHERS = (
    *(("GET", path, b"") for path in (
        "/v2", "/v2/health/live", "/v2/health/ready", "/v2/openapi.json", "/v2/models/stats", "/v2/models/simple",
        "/v2/models/simple/versions/1/ready", "/v2/models/simple/config", "/v2/models/simple/versions/1/stats",
        "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/r/status", "/v2/trace/setting", "/v2/logging",
    )),
    ("POST", "/v2/repository/index", b'{"ready": true}'),
    ("POST", "/v2/repository/models/simple/load", b'{"parameters": {"config": "{}", "file:1/model.onnx": "YQ=="}}'),
    ("POST", "/v2/repository/models/simple/unload", b'{"parameters": {"unload_dependents": true}}'),
    ("POST", "/v2/systemsharedmemory/region/r/register", _REGION),
    ("POST", "/v2/cudasharedmemory/region/r/register", _GPU_REGION),
    ("POST", "/v2/systemsharedmemory/region/r/unregister", b""),
    ("POST", "/v2/models/simple/trace/setting", _TRACES),
    ("POST", "/v2/logging", b'{"log_verbose_level": 1, "log_format": "ISO8601", "log_info": true}'),
)  # fmt: skip
"""Of every group of paths but inference: verb, path, body."""


@st.composite
def built_rests(draw: st.DrawFn) -> bytes:
    """Requests in REST's form, heads of any members, and any JSON to the other paths."""
    match draw(st.integers(0, 3)):
        case 0:
            request = draw(requests())
            head, tail = body_of(request)
            return pack("POST", path_of(request), str(len(head) + draw(st.sampled_from([0, 0, 0, -1, 1]))), head + tail)
        case 1 | 2:
            text = json.dumps(draw(HEADS)).encode()
            model = draw(st.sampled_from(["simple", "any", "text", "half", "bias", "picky", "reshaped"]))
            off = draw(st.sampled_from([None, None, 0, 0, -1, 1]))
            tail = b"" if off is None else draw(st.binary(max_size=40))
            return pack("POST", f"/v2/models/{model}/infer", "-" if off is None else str(len(text) + off), text + tail)
        case _:
            verb, path, body = draw(st.sampled_from(OTHERS))
            fields: Any = json.loads(body) if body else {}
            for key in draw(st.lists(st.sampled_from([*fields, "parameters", "trace_mode", "log_file"]), max_size=2)):
                fields[key] = draw(VALUES)
            return pack(draw(st.sampled_from([verb, verb, "GET", "POST"])), path, "-", json.dumps(fields).encode())


@contextmanager
def open_rests(directory: Path) -> Iterator[Rests]:
    with serving.serving(directory) as server:
        yield Rests(server)
