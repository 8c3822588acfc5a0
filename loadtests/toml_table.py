"""Reads a table of a TOML file key by key: what is missing, of another type or unknown is refused by file and key."""

from __future__ import annotations

import math
import tomllib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MISSING: Final = object()


class ScenarioError(Exception):
    """A scenario file cannot be used; the text names the file, the key and what is expected there."""


def read_toml(path: Path) -> Table:
    """The whole file. ScenarioError when it cannot be read, or is no TOML."""
    try:
        with path.open("rb") as file:
            return Table(tomllib.load(file), str(path), "")
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: no TOML: {error}") from None


class Table:
    """One table; `name` is its place in the file, "" for the top. Every method raises ScenarioError.

    A key is known once it was asked for: `refuse_unknown` comes last.
    """

    def __init__(self, values: dict[str, Any], file: str, name: str) -> None:
        self._values = values
        self._file = file
        self._name = name
        self._known: list[str] = []

    def error(self, key: str, problem: str) -> ScenarioError:
        """What is wrong with a key ("": with the table), to be raised."""
        place = " ".join(part for part in (f"[{self._name}]" if self._name else "", key) if part)
        return ScenarioError(f"{self._file}: {place}: {problem}" if place else f"{self._file}: {problem}")

    def has(self, key: str) -> bool:
        """Whether the file has this key."""
        self._known.append(key)
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = self._get(key, default, "a string that is not empty")
        if not isinstance(value, str) or (not value and default != ""):
            raise self._unexpected(key, "a string that is not empty", value)
        return value

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of these strings."""
        expected = "one of " + ", ".join(f'"{choice}"' for choice in choices)
        value = self._get(key, default, expected)
        if not isinstance(value, str) or value not in choices:
            raise self._unexpected(key, expected, value)
        return value

    def number(
        self, key: str, default: float | None = None, *, least: float = 0.0, above: bool = True, most: float = math.inf
    ) -> float:
        """A finite number above `least` (from it on, unless `above`), `most` at most."""
        expected = f"a number {f'above {least:g}' if above else f'from {least:g} on'}"
        expected += f", at most {most:g}" if most < math.inf else ""
        value = self._get(key, default, expected)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < least or (above and value == least) or value > most:
            raise self._unexpected(key, expected, value)
        return float(value)

    def integer(self, key: str, default: int | None = None, *, least: int, most: int) -> int:
        """A whole number between `least` and `most`."""
        expected = f"a whole number from {least} to {most}"
        value = self._get(key, default, expected)
        if not _is_whole(value, least, most):
            raise self._unexpected(key, expected, value)
        return int(value)

    def integers(self, key: str, default: int, *, least: int, most: int) -> tuple[int, ...]:
        """A whole number, or a list of one or more."""
        expected = f"a whole number from {least} to {most}, or a list of such"
        value = self._get(key, default, expected)
        several = value if isinstance(value, list) else [value]
        if not several or not all(_is_whole(each, least, most) for each in several):
            raise self._unexpected(key, expected, value)
        return tuple(several)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, empty where it is missing."""
        value = self._get(key, [], "a list of strings")
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._unexpected(key, "a list of strings", value)
        return tuple(value)

    def table(self, key: str, *, required: bool = True) -> Table:
        """The table under a key; without any keys where it is missing and need not be there."""
        value = self._get(key, None if required else {}, f"a table, [{key}]")
        if not isinstance(value, dict):
            raise self._unexpected(key, f"a table, [{key}]", value)
        return Table(value, self._file, key)

    def tables(self, key: str) -> list[Table]:
        """The tables of an array of one or more."""
        expected = f"one table or more, each [[{key}]]"
        value = self._get(key, None, expected)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self._unexpected(key, expected, value)
        return [Table(each, self._file, f"{key} {number}") for number, each in enumerate(value, 1)]

    def refuse_unknown(self) -> None:
        """To be called once everything that is known was asked for."""
        for key in self._values:
            if key not in self._known:
                known = ", ".join(dict.fromkeys(self._known))
                raise self.error(key, f"unknown key; known here: {known}")

    def _get(self, key: str, default: Any, expected: str) -> Any:
        self._known.append(key)
        value = self._values.get(key, _MISSING)
        if value is not _MISSING:
            return value
        if default is None:
            raise self.error(key, f"missing; expected {expected}")
        return default

    def _unexpected(self, key: str, expected: str, value: Any) -> ScenarioError:
        return self.error(key, f"expected {expected}, got {value!r}")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
