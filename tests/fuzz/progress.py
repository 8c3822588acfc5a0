"""How far a run is and which input it is at, in a file that its parent sees whatever becomes of the run itself."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

INPUT_BYTES_MAX = 1 << 20
"""Of an input that is kept; no target takes one as large."""

_HEAD = struct.Struct("<QI")


class Progress:
    """The count of inputs that have begun, and the last one. One process notes, another may look at any time."""

    def __init__(self, path: Path) -> None:
        """Open the file; `create` made it."""
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path) -> Progress:
        """Make the file, at no input."""
        with path.open("xb") as file:
            file.truncate(_HEAD.size + INPUT_BYTES_MAX)
        return cls(path)

    def note(self, count: int, data: bytes) -> None:
        """The input of this number begins."""
        kept = data[:INPUT_BYTES_MAX]
        self._map[_HEAD.size : _HEAD.size + len(kept)] = kept
        _HEAD.pack_into(self._map, 0, count, len(kept))

    @property
    def count(self) -> int:
        """How many have begun."""
        count: int = _HEAD.unpack_from(self._map)[0]
        return count

    @property
    def data(self) -> bytes:
        """The last one that has."""
        _, length = _HEAD.unpack_from(self._map)
        return self._map[_HEAD.size : _HEAD.size + length]
