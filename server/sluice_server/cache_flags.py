"""`--cache-config`, as Triton has it: `local,size=BYTES`, and the deprecated flag that says only the size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_server.flag_values import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCAL = "local"
"""The implementation that there is: in the server's memory."""


def cache_bytes(entries: Sequence[str], deprecated_bytes: int | None) -> int:
    """The size of the response cache, 0 for none; `SettingsError` names what is wrong."""
    if entries and deprecated_bytes is not None:
        raise SettingsError("--response-cache-byte-size and --cache-config say the same: give the latter only")
    size_bytes = deprecated_bytes or 0
    for entry in entries:
        name, comma, setting = entry.partition(",")
        key, _, value = setting.partition("=")
        if name != LOCAL:
            raise SettingsError(
                f"--cache-config={entry}: there is no cache {name!r} here, only {LOCAL}, in this server's memory"
            )
        if not comma or key != "size" or not value.isdecimal():
            raise SettingsError(f"--cache-config={entry}: expected {LOCAL},size=BYTES, a whole number >= 0")
        size_bytes = int(value)
    return size_bytes
