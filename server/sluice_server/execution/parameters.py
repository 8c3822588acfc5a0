"""Typed reading of a model configuration's `parameters`, which are strings, with errors that say where and what."""

import re
from collections.abc import Mapping, Sequence

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import InvalidArgument

_SWITCHES = {"1": True, "true": True, "0": False, "false": False}


class BadOption(InvalidArgument):
    """A parameter of a model's configuration has a value that it cannot have."""

    def __init__(self, model: str, key: str, value: str, expected: str) -> None:
        super().__init__(f"model '{model}': parameter '{key}' is '{value}', expected {expected}")
        self.model = model
        self.key = key
        self.value = value
        self.expected = expected


def parameter_values(config: ModelConfig) -> dict[str, str]:
    """Give the `parameters` of a model's configuration as plain strings."""
    return {key: parameter.string_value for key, parameter in config.parameters.items()}


def read_switch(model: str, key: str, value: str) -> bool:
    """Read `0`, `1`, `true` or `false`; BadOption otherwise."""
    try:
        return _SWITCHES[value.lower()]
    except KeyError:
        raise BadOption(model, key, value, "0, 1, true or false") from None


def read_int(model: str, key: str, value: str, low: int, high: int) -> int:
    """Read a whole number in [low, high]; BadOption otherwise."""
    # `int()` alone would also take blanks, underscores and a number of any length.
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", value) or not low <= int(value) <= high:
        raise BadOption(model, key, value, f"a whole number from {low} to {high}")
    return int(value)


def read_choice(model: str, key: str, value: str, choices: Mapping[str, str]) -> str:
    """Read one of several words or their numbers; `choices` maps each spelling to what it means."""
    try:
        return choices[value]
    except KeyError:
        raise BadOption(model, key, value, "one of " + ", ".join(choices)) from None


def pick(model: str, parameters: Mapping[str, str], keys: Sequence[str]) -> tuple[str, str] | None:
    """Give (key, value) of the parameter that is set among names for one thing; BadOption when two differ."""
    found = [(key, parameters[key]) for key in keys if key in parameters]
    if not found:
        return None
    first = found[0]
    for key, value in found[1:]:
        if value != first[1]:
            raise BadOption(model, key, value, f"the same as '{first[0]}', which is '{first[1]}'")
    return first
