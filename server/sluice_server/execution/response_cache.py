"""The response cache of the server: answers by what was asked, for every model version that has `response_cache` on.

An answer is found by a 128-bit hash of the inputs and given only when the inputs are the same byte for byte, so a
collision costs a hit and never gives a wrong answer. So an entry keeps the inputs too, and they count in its size.
What is not in the bytes of the inputs (version, shapes, requested outputs, classes) is told apart by a number, the
specification: it seeds the hash, and is compared as well.

Lock: `ResponseCache.lock` guards the table, and the flights of every version (`model_cache.py`). It is held while a
list of requests is looked up or a batch of answers is put: for some dictionary operations each. Hashing is done before.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash

from sluice_batching import LruTable
from sluice_proto import tensors
from sluice_server.observability.metrics import CacheUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from typing_extensions import Buffer

    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.interface import ModelInterface

Content: TypeAlias = "bytes | np.ndarray | tuple[bytes | np.ndarray, ...]"
"""What is hashed and compared of the inputs: the only one, or all in the order of the configuration; BYTES as on the
wire."""

Payload: TypeAlias = "bytes | tuple[Buffer, ...]"
"""An answer without its request's id: one piece, or the parts of the encoder (the head, then a prefix and a raw tensor
for each output)."""

Fingerprint: TypeAlias = "tuple[bytes, int, Content]"
"""What requests are told apart by: the hash, the specification, the content. The hash alone is the key."""

Entry: TypeAlias = "tuple[int, Fingerprint, Payload]"
"""Its size in bytes, what was asked, and the answer. Plain tuples of what the collector need not follow: a million of
them must not make its runs longer."""

Digest: TypeAlias = "Callable[[Any, int], bytes]"
"""A hash of 16 bytes over a buffer (arrays too; numpy's stubs know of that from Python 3.12 on), with a seed."""

ENTRY_BYTES = 640
"""What an entry takes beside the bytes of its message and its answer: measured with small tensors, Python 3.11."""

SPECS_MAX = 4096
"""Specifications that a version remembers by number: more than the shapes in use. With more all get new numbers, and
what was kept under the old ones is not found any more."""

JOINED_BYTES_MAX = 4096
"""Up to this size inputs are copied and answers joined to be hashed, compared and kept; larger ones stay in place."""

OWNER_SHIFT = 32
"""A specification's number has its version's number above these bits."""


class ResponseCache:
    """Every version's answers in one table; for any thread, with `lock` held where a method says so."""

    def __init__(self, max_bytes: int, digest: Digest = xxhash.xxh3_128_digest) -> None:
        self.lock = threading.Lock()
        self.table: LruTable[Entry] = LruTable(max_bytes)
        self.digest = digest
        # Nobody outside can foresee the seeds, and so make up inputs whose hashes are the same.
        self._owners = itertools.count(secrets.randbits(31))

    def __repr__(self) -> str:
        return f"<ResponseCache {self.table!r}>"

    def new_owner(self) -> int:
        """A number for a version that is being loaded, which no other has."""
        return next(self._owners)

    def find(self, fingerprint: Fingerprint) -> Payload | None:
        """The answer to what was asked, which is used by that; the lock is held."""
        key = fingerprint[0]
        entry = self.table.peek(key)
        if entry is None or not is_same(entry[1], fingerprint):
            return None
        self.table.use(key)
        return entry[2]

    def forget(self, owner: int) -> None:
        """Forget all answers of a version; takes the lock for a thousand entries at a time."""
        with self.lock:
            keys = iter(self.table.keys())
        while chunk := list(itertools.islice(keys, 1000)):
            with self.lock:
                for key in chunk:
                    entry = self.table.peek(key)
                    if entry is not None and entry[1][1] >> OWNER_SHIFT == owner:
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

    __slots__ = ("_digest", "_inputs", "_next_spec", "_only_input", "_plain_specs", "_specs")

    def __init__(self, interface: ModelInterface, owner: int, digest: Digest) -> None:
        self._digest = digest
        self._inputs = tuple(interface.inputs.values())
        # The only input of a fixed-size type: its view of the message is all that there is to hash.
        single = len(self._inputs) == 1 and self._inputs[0].dtype.itemsize and not self._inputs[0].optional
        self._only_input = self._inputs[0].name if single else ""
        self._next_spec = itertools.count(owner << OWNER_SHIFT)
        self._specs: dict[Hashable, int] = {}
        # By what a plain request carries with it already.
        self._plain_specs: dict[tuple[Hashable, int], int] = {}

    def of(self, requests: Iterable[InferRequest]) -> list[Fingerprint]:
        """The fingerprint of each request; none of them has inputs in shared memory any more."""
        digest, only_input = self._digest, self._only_input
        last_key = last_rows = spec = None
        found: list[Fingerprint] = []
        for request in requests:
            if request.classes is not None or request.shared is not None:
                own_spec = self._spec(request)
            else:
                if request.key is not last_key or request.rows != last_rows:
                    last_key, last_rows = request.key, request.rows
                    spec = self._plain_spec(request)
                own_spec = spec  # type: ignore[assignment] # it is set with the first key
            if only_input:
                array = request.arrays[only_input]
                found.append((digest(array, own_spec), own_spec, array))
            else:
                found.append(self._of_several(request, own_spec))
        return found

    def _of_several(self, request: InferRequest, spec: int) -> Fingerprint:
        arrays = request.arrays
        content: tuple[Any, ...] = tuple(
            arrays[item.name] if item.dtype.itemsize else tensors.to_buffer(arrays[item.name])
            for item in self._inputs
            if item.name in arrays
        )
        if sum(map(memory_bytes, content)) <= JOINED_BYTES_MAX:
            # As long as the lengths of all but one follow from the specification, no two contents are joined alike;
            # and whatever is joined alike is compared part by part.
            return self._digest(b"".join(content), spec), spec, content
        parts = b"".join([self._digest(part, spec) for part in content])
        return self._digest(parts, spec), spec, content

    def _plain_spec(self, request: InferRequest) -> int:
        plain = (request.key, request.rows)
        spec = self._plain_specs.get(plain)
        if spec is None:
            if len(self._plain_specs) >= SPECS_MAX:
                self._plain_specs.clear()
            spec = self._plain_specs[plain] = self._spec(request)
        return spec

    def _spec(self, request: InferRequest) -> int:
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
            spec = self._specs[told_apart] = next(self._next_spec)
        return spec


def is_same(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two requests of equal hashes ask for the same: specifications and all bytes are compared."""
    if one[1] != other[1]:
        return False
    mine, theirs = one[2], other[2]
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return len(mine) == len(theirs) and all(map(_has_same_bytes, mine, theirs))
    return _has_same_bytes(mine, theirs)  # type: ignore[arg-type] # one model's contents are all of one form


def _has_same_bytes(one: bytes | np.ndarray, other: bytes | np.ndarray) -> bool:
    size_bytes = memory_bytes(one)
    if size_bytes != memory_bytes(other):
        return False
    if size_bytes <= JOINED_BYTES_MAX:
        return _copied(one) == _copied(other)
    return bool(np.array_equal(_flat(one), _flat(other)))


def memory_bytes(data: bytes | np.ndarray) -> int:
    """How many bytes a buffer has."""
    return len(data) if isinstance(data, bytes) else data.nbytes


def _copied(data: bytes | np.ndarray) -> bytes:
    return data if isinstance(data, bytes) else data.tobytes()


def _flat(data: bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
