"""The response cache of the server: answers by what was asked, for every model version that has `response_cache` on.

An answer is found by a 128-bit hash of the inputs and given only when the inputs are the same byte for byte, so a
collision costs a hit and never gives a wrong answer. So an entry keeps the inputs too, and they count in its size.
What is not in the bytes of the inputs (version, shapes, requested outputs, classes) is told apart by a number, the
specification: it seeds the hash, and is compared as well.

A small entry is one `bytes`: specification, inputs, answer. That is one thing to make and to free, nothing that the
collector follows, and nothing else that it keeps in memory. A large one refers to the tensors and copies none.

Lock: `ResponseCache.lock` guards the table, and the flights of every version (`model_cache.py`). It is held while a
list of requests is looked up or a batch of answers is put: for some dictionary operations each. Hashing is done before.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import xxhash

from sluice_batching import LruTable
from sluice_proto import tensors
from sluice_server.observability.metrics import CacheUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from typing_extensions import Buffer

    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.interface import ModelInterface

Content: TypeAlias = "bytes | tuple[bytes | np.ndarray, ...]"
"""What is hashed and compared of the inputs, in the order of the configuration, BYTES as on the wire: joined when they
are small. A specification and the joined bytes say what each input is."""

Payload: TypeAlias = "bytes | tuple[Buffer, ...]"
"""An answer without its request's id: one piece, or the parts of the encoder (the head, then a prefix and a raw tensor
for each output)."""

Digest: TypeAlias = "Callable[[Any, int], bytes]"
"""A hash of 16 bytes over a buffer (arrays too; numpy's stubs know of that from Python 3.12 on), with a seed."""

ENTRY_BYTES = 160
"""What an entry takes beside its bytes: its key, its places in the table, the heads of the objects. Python 3.11 takes
120 to 200 for a small one, depending on how full the table is; a test holds it to that."""

SMALL_BYTES_MAX = 4096
"""Up to this size inputs and answers are copied into one piece, which takes less than keeping several."""

SPECS_MAX = 4096
"""Specifications that a version remembers by number: more than the shapes in use. With more all get new numbers, and
what was kept under the old ones is not found any more."""

_OWNER_BYTES = 4
_NUMBER_BYTES = 4


class Spec(NamedTuple):
    """The number of a specification, as a seed and as bytes; the first four are those of its version."""

    seed: int
    prefix: bytes


Fingerprint: TypeAlias = tuple[bytes, bytes, Content]
"""What requests are told apart by: the hash, the specification, the content. The hash alone is the key."""


class LargeEntry:
    """What was asked and answered, where that is more than a few kilobytes; its length is its size in bytes."""

    __slots__ = ("_size_bytes", "content", "payload", "prefix")

    def __init__(self, prefix: bytes, content: Content, payload: Payload, size_bytes: int) -> None:
        self.prefix = prefix
        self.content = content
        self.payload = payload
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes


class ResponseCache:
    """Every version's answers in one table; for any thread, with `lock` held where a method says so."""

    def __init__(self, max_bytes: int, digest: Digest = xxhash.xxh3_128_digest) -> None:
        self.lock = threading.Lock()
        self.table: LruTable[bytes | LargeEntry] = LruTable(max_bytes, entry_bytes=ENTRY_BYTES)
        self.digest = digest
        # Nobody outside can foresee the seeds, and so make up inputs whose hashes are the same.
        self._owners = itertools.count(secrets.randbits(8 * _OWNER_BYTES - 1))

    def __repr__(self) -> str:
        return f"<ResponseCache {self.table!r}>"

    def new_owner(self) -> bytes:
        """Four bytes for a version that is being loaded, which no other has."""
        return next(self._owners).to_bytes(_OWNER_BYTES, "big")

    def find(self, fingerprint: Fingerprint) -> Payload | None:
        """The answer to what was asked, which is used by that; the lock is held."""
        key, prefix, content = fingerprint
        entry = self.table.peek(key)
        payload: Payload
        if isinstance(entry, bytes):
            if not isinstance(content, bytes) or not entry.startswith(asked := prefix + content):
                return None
            payload = entry[len(asked) :]
        elif entry is None or entry.prefix != prefix or not is_same(entry.content, content):
            return None
        else:
            payload = entry.payload
        self.table.use(key)
        return payload

    def forget(self, owner: bytes) -> None:
        """Forget all answers of a version; takes the lock for a thousand entries at a time."""
        with self.lock:
            keys = iter(self.table.keys())
        while chunk := list(itertools.islice(keys, 1000)):
            with self.lock:
                for key in chunk:
                    entry = self.table.peek(key)
                    if entry is not None and _prefix_of(entry).startswith(owner):
                        self.table.discard(key)

    def usage(self) -> CacheUsage:
        """What the metrics show."""
        with self.lock:
            table = self.table
            return CacheUsage(table.max_bytes, table.size_bytes, len(table), table.evictions)


class Fingerprints:
    """Makes the fingerprints of the requests to one model version; for any thread.

    Two threads that meet a new specification at once may give it two numbers: a hit is lost, nothing more.
    """

    __slots__ = (
        "_digest",
        "_inputs",
        "_key_tells_shapes",
        "_numbers",
        "_only_input",
        "_owner",
        "_plain_specs",
        "_specs",
    )

    def __init__(self, interface: ModelInterface, owner: bytes, digest: Digest) -> None:
        self._digest = digest
        self._owner = owner
        self._inputs = tuple(interface.inputs.values())
        self._key_tells_shapes = interface.key_tells_shapes
        # The only input of a fixed-size type: its view of the message is all that there is to hash.
        single = len(self._inputs) == 1 and self._inputs[0].dtype.itemsize and not self._inputs[0].optional
        self._only_input = self._inputs[0].name if single and self._key_tells_shapes else ""
        self._numbers = itertools.count()
        self._specs: dict[Hashable, Spec] = {}
        # By what a plain request carries with it already.
        self._plain_specs: dict[tuple[Hashable, int], Spec] = {}

    def of(self, requests: Sequence[InferRequest]) -> list[Fingerprint]:
        """The fingerprint of each request; none of them has inputs in shared memory any more."""
        first = requests[0]
        name, key, rows = self._only_input, first.key, first.rows
        # The keys of plain requests of one kind are one object, and those of others are made for each.
        if (
            not name
            or first.shared is not None
            or first.classes is not None
            or first.arrays[name].nbytes > SMALL_BYTES_MAX
            or [request for request in requests if request.key is not key or request.rows != rows]
        ):
            return [self._of_one(request) for request in requests]
        seed, prefix = self._plain_spec(first)
        contents = [request.arrays[name].tobytes() for request in requests]
        digests = map(self._digest, contents, itertools.repeat(seed))
        return list(zip(digests, itertools.repeat(prefix), contents, strict=False))  # the prefix has no end

    def _of_one(self, request: InferRequest) -> Fingerprint:
        is_plain = request.classes is None and request.shared is None and self._key_tells_shapes
        seed, prefix = self._plain_spec(request) if is_plain else self._spec(request)
        arrays = request.arrays
        parts: tuple[Any, ...] = tuple(
            arrays[item.name] if item.dtype.itemsize else tensors.to_buffer(arrays[item.name])
            for item in self._inputs
            if item.name in arrays
        )
        if sum(map(_size_of, parts)) <= SMALL_BYTES_MAX:
            content = b"".join([_copied(part) for part in parts])
            return self._digest(content, seed), prefix, content
        digest = self._digest(parts[0], seed)
        for part in parts[1:]:
            digest = self._digest(digest + self._digest(part, seed), seed)
        return digest, prefix, parts

    def _plain_spec(self, request: InferRequest) -> Spec:
        plain = (request.key, request.rows)
        spec = self._plain_specs.get(plain)
        if spec is None:
            if len(self._plain_specs) >= SPECS_MAX:
                self._plain_specs.clear()
            spec = self._plain_specs[plain] = self._spec(request)
        return spec

    def _spec(self, request: InferRequest) -> Spec:
        """The number of everything in a request that is not in the bytes of its inputs."""
        arrays = request.arrays
        shapes = tuple((item.name, arrays[item.name].shape) for item in self._inputs if item.name in arrays)
        counts = tuple((name, classes.count) for name, classes in (request.classes or {}).items())
        told_apart = (request.output_names, shapes, counts)
        spec = self._specs.get(told_apart)
        if spec is None:
            if len(self._specs) >= SPECS_MAX:
                self._specs.clear()
                self._plain_specs.clear()
            prefix = self._owner + next(self._numbers).to_bytes(_NUMBER_BYTES, "big")
            spec = self._specs[told_apart] = Spec(int.from_bytes(prefix, "big"), prefix)
        return spec


def make_entries(
    batch: Sequence[InferRequest], payloads: Sequence[Sequence[Buffer]], *, shares_memory: bool
) -> list[bytes | LargeEntry]:
    """What is kept of requests and their answers, whose parts `shares_memory` with each other, as one batch's do.

    Requests of a batch ask for the same outputs, so their answers have equally many parts.
    """
    _, prefixes, contents = zip(*[request.fingerprint for request in batch], strict=True)
    if tuple not in map(type, contents) and _parts_bytes(payloads[0]) <= SMALL_BYTES_MAX:
        # Each column is one part of all entries.
        return list(map(b"".join, zip(prefixes, contents, *zip(*payloads, strict=True), strict=True)))
    entries: list[bytes | LargeEntry] = []
    for request, prefix, content, payload in zip(batch, prefixes, contents, payloads, strict=True):
        parts = tuple(map(bytes, payload)) if shares_memory else tuple(payload)
        # The content is views of the message, which holds little else.
        entries.append(LargeEntry(prefix, content, parts, request.size_bytes + _parts_bytes(parts)))
    return entries


def is_same(one: Content, other: Content) -> bool:
    """Whether the inputs of two requests of one specification are the same, byte for byte."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_has_same_bytes, one, other))
    return one == other


def _has_same_bytes(one: bytes | np.ndarray, other: bytes | np.ndarray) -> bool:
    return bool(np.array_equal(_flat(one), _flat(other)))


def _flat(data: bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)


def _parts_bytes(parts: Sequence[Buffer]) -> int:
    return sum(map(len, parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes


def _copied(data: bytes | np.ndarray) -> bytes:
    return data if isinstance(data, bytes) else data.tobytes()


def _size_of(data: bytes | np.ndarray) -> int:
    return len(data) if isinstance(data, bytes) else data.nbytes


def _prefix_of(entry: bytes | LargeEntry) -> bytes:
    return entry[: _OWNER_BYTES + _NUMBER_BYTES] if isinstance(entry, bytes) else entry.prefix
