"""Inference requests over REST, and the parts of their answers."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from support.server import CALL_TIMEOUT_S, LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from support.server import RunningServer

HEAD_LENGTH = "inference-header-content-length"


class RawAnswer(NamedTuple):
    """An HTTP answer as it came; header names are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        """The whole body as JSON."""
        return json.loads(self.body)


def request(
    server: RunningServer, verb: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> RawAnswer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(LOOPBACK, server.server.http_port, timeout=CALL_TIMEOUT_S)
    try:
        connection.putrequest(verb, path)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            connection.putheader(name, value.encode())
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        return RawAnswer(response.status, data, {name.lower(): value for name, value in response.getheaders()})
    finally:
        connection.close()


def post_infer(
    server: RunningServer,
    model: str,
    head: dict[str, Any] | bytes,
    tail: bytes | None = None,
    *,
    head_length: int | str | None = None,
    headers: Mapping[str, str] | None = None,
) -> RawAnswer:
    """One inference request; with a tail, or when it is given, the length of the head is told."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    if tail is not None and head_length is None:
        head_length = len(text)
    more = {} if head_length is None else {HEAD_LENGTH: str(head_length)}
    return request(server, "POST", f"/v2/models/{model}/infer", text + (tail or b""), {**more, **(headers or {})})


def split_answer(answer: RawAnswer) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of an answer, and its binary tensors by output."""
    assert answer.status == 200, answer.body
    length = int(answer.headers.get(HEAD_LENGTH, len(answer.body)))
    told = json.loads(answer.body[:length])
    tensors = {}
    offset = length
    for output in told["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            tensors[output["name"]] = answer.body[offset : offset + size]
            offset += size
    assert offset == len(answer.body)
    return told, tensors
