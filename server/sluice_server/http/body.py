"""Bodies of HTTP requests and answers: content encodings, with bounds on what is inflated. Pure."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from sluice_server.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

GZIP_BITS, ZLIB_BITS = 31, 15
"""zlib's names for the two formats; HTTP's `deflate` is the second."""

LEVEL = 1
"""Tensors compress badly: the fastest level gets most of what there is."""

_FORMATS = {"gzip": GZIP_BITS, "x-gzip": GZIP_BITS, "deflate": ZLIB_BITS}


def too_large(got: str, limit_bytes: int) -> InvalidArgument:
    """The refusal of a body above the limit, with the words that Triton's users look for."""
    return InvalidArgument(
        f"Request body size {got} bytes exceeds the maximum allowed value of {limit_bytes} bytes."
        " Use --http-max-input-size to increase the limit."
    )


def inflate(encoding: str, body: bytes, limit_bytes: int) -> bytes:
    """Undo a request's Content-Encoding; memory is bounded by the limit, whatever the body claims."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _FORMATS:
        raise Unimplemented(f"Unsupported compression type '{encoding[:40]}', expected gzip or deflate")
    whole: list[bytes] = []
    left_bytes = limit_bytes
    data = body
    while True:
        # gzip may be several members, one after the other.
        machine = zlib.decompressobj(_FORMATS[name])
        try:
            piece = machine.decompress(data, left_bytes + 1)
        except zlib.error as error:
            raise InvalidArgument(f"the body of the request is not {name}: {error}") from error
        whole.append(piece)
        left_bytes -= len(piece)
        if left_bytes < 0:
            raise too_large(f"(inflated) of more than {limit_bytes}", limit_bytes)
        if not machine.eof:
            raise InvalidArgument(f"the body of the request is not {name}: it is cut off")
        data = machine.unused_data
        if not data:
            return b"".join(whole)
        if name == "deflate" or not piece:
            raise InvalidArgument(f"the body of the request is not {name}: {len(data)} bytes follow its end")


def deflate(encoding: str, parts: Sequence[Buffer]) -> bytes:
    """Compress an answer."""
    machine = zlib.compressobj(LEVEL, wbits=_FORMATS[encoding])
    return b"".join([*(machine.compress(part) for part in parts), machine.flush()])


def choose_encoding(accept: str) -> str | None:
    """What to compress an answer with: the client's favourite of gzip and deflate; None: neither is named."""
    best, best_weight = None, 0.0
    for item in accept.lower().split(","):
        name, _, parameters = item.partition(";")
        weight = _weight(parameters)
        if name.strip() in ("gzip", "deflate") and weight > best_weight:
            best, best_weight = name.strip(), weight
    return best


def _weight(parameters: str) -> float:
    key, _, value = parameters.strip().partition("=")
    if key.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
