"""`--rate-limit` and `--rate-limit-resource`, as Triton has them: a mode, and how many there are of a resource."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import Resource
from sluice_server.flag_values import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OFF, EXECUTION_COUNT = "off", "execution_count"
"""The modes: instances run as soon as they can, or by the claims of their groups and how often they have run."""


def rate_limit(mode: str, entries: Sequence[str]) -> Mapping[Resource, int] | None:
    """The numbers of copies that were given, by resource; None: no limit. `SettingsError` names what is wrong."""
    if mode == OFF:
        if entries:
            raise SettingsError(f"--rate-limit-resource={entries[0]} needs --rate-limit={EXECUTION_COUNT}")
        return None
    copies: dict[Resource, int] = {}
    for entry in entries:
        name, *numbers = entry.split(":")
        if not name or not 1 <= len(numbers) <= 2 or not all(map(_is_number, numbers)):
            raise SettingsError(
                f"--rate-limit-resource={entry}: expected NAME:COUNT or NAME:COUNT:DEVICE, whole numbers >= 0"
            )
        resource = Resource(name, int(numbers[1]) if len(numbers) > 1 else None)
        if resource in copies:
            raise SettingsError(f"--rate-limit-resource={entry}: the count of this resource was given before")
        copies[resource] = int(numbers[0])
    return copies


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
