"""Headers that become parameters of their request (`--grpc-` and `--http-header-forward-pattern`).

Triton hands such parameters to its backends. ONNX models take none, so here they are in the traces of sampled requests;
a request that is not sampled pays nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable


def forwarded(pattern: re.Pattern[str], metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """The headers whose names, in lower case, the pattern is found in, as text; of equal names the last one counts."""
    return {name: _text(value) for name, value in metadata if pattern.search(name)}


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
