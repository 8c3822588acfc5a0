"""Reads a model's configuration: config.pbtxt as protobuf text, or the JSON of a load request."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, cast

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_proto.pool import POOL
from sluice_server.repository.errors import ConfigError

MAX_CONFIG_BYTES: Final = 4 << 20
"""A configuration is a page or two; a megabyte of labels in `parameters` is already strange. Parsing is not free."""

CONFIG_OVERRIDE: Final = "config override"
"""What a message calls the `config` parameter of a load request."""

_UNKNOWN_FIELD: Final = re.compile(r'Message type "inference\.([\w.]+)" has no field named "([^"]*)"')
_REWORDED: Final = (  # what protobuf says, and how it reads to somebody who does not know protobuf
    (
        re.compile(r'Message type "inference\.([\w.]+)" should not have multiple "(\w+)" fields'),
        r"\2 is given twice in \1",
    ),
    (re.compile(r'Field "(\w+)" is specified along with field "(\w+)".*'), r"only one of \2 and \1 can be given"),
    (re.compile(r'Enum type "inference\.([\w.]+)" has no value named (\w+)'), r"\2 is no \1"),
)
_QUOTED_LINE: Final = re.compile(r"^'.*?': (?=[A-Z])", re.DOTALL)  # protobuf repeats the whole line first


def read_config(path: Path) -> ModelConfig:
    """Read and parse one config.pbtxt; every failure is a ConfigError that names the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", source=str(path)) from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError("is not UTF-8 text", source=str(path), line=line, column=column) from error
    return parse_text(text, str(path))


def parse_text(text: str, source: str) -> ModelConfig:
    """Parse protobuf text.

    Raises ConfigError with `source`, line and column for a syntax error, an unknown field or enum value, or a
    value that does not fit its field.
    """
    _check_size(text, source)
    config = ModelConfig()
    try:
        text_format.Parse(text, config, descriptor_pool=POOL)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        what = _own_words(str(error).removeprefix(f"{line}:{column} : "))
        raise ConfigError(what, source=source, line=line, column=column) from error
    except ValueError as error:  # of an enum's number that 32 bits do not hold; protobuf does not say where it is
        raise ConfigError(f"the number of an enum's value: {error}", source=source) from error
    return config


def parse_json(text: str) -> ModelConfig:
    """Parse the JSON of a load request's `config` parameter, field names in either of protobuf's spellings.

    Numbers may be strings. Raises ConfigError for bad JSON (with line and column), an unknown field, and a value
    that does not fit its field.
    """
    _check_size(text, CONFIG_OVERRIDE)
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"is not JSON: {error.msg}", source=CONFIG_OVERRIDE, line=error.lineno, column=error.colno
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ConfigError(f"is not usable JSON: {error}", source=CONFIG_OVERRIDE) from error
    _check_unicode(tree)
    _check_tree(tree, cast("Descriptor", ModelConfig.DESCRIPTOR), "")
    config = ModelConfig()
    try:
        json_format.ParseDict(tree, config, descriptor_pool=POOL)
    except json_format.ParseError as error:
        raise ConfigError(str(error).rstrip("."), source=CONFIG_OVERRIDE) from error
    except (OverflowError, ValueError) as error:  # of an enum's number too; protobuf does not say where it is
        raise ConfigError(f"the number of an enum's value: {error}", source=CONFIG_OVERRIDE) from error
    return config


def _check_size(text: str, source: str) -> None:
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"is larger than {MAX_CONFIG_BYTES} bytes", source=source)


def _own_words(message: str) -> str:
    """Say what is wrong without protobuf's own type names, and offer the field that was probably meant."""
    unknown = _UNKNOWN_FIELD.search(message)
    if unknown is None:
        message = _QUOTED_LINE.sub("", message).rstrip(".")
        for pattern, words in _REWORDED:
            message = pattern.sub(words, message)
        return message
    descriptor = POOL.FindMessageTypeByName(f"inference.{unknown[1]}")  # type: ignore[no-untyped-call]
    return _unknown_field(unknown[2], descriptor)


def _unknown_field(name: str, descriptor: Descriptor) -> str:
    close = difflib.get_close_matches(name, descriptor.fields_by_name, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown field '{name}' in {descriptor.name}{hint}"


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"member '{key}' appears twice")
        members[key] = value
    return members


def _check_unicode(tree: object) -> None:
    """Refuse halves of surrogate pairs, which JSON can write, and which neither protobuf nor a status can carry."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{item!a} is not Unicode text", source=CONFIG_OVERRIDE) from error


def _check_tree(tree: object, descriptor: Descriptor, path: str) -> None:
    """Refuse unknown members, and anything but an object where a message belongs (protobuf takes `[]` for one)."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the top level'} must be a JSON object", field=path, source=CONFIG_OVERRIDE)
    fields = {field.camelcase_name: field for field in descriptor.fields} | dict(descriptor.fields_by_name)
    seen = set()
    for key, value in tree.items():
        field = fields.get(key)
        where = f"{path}.{key}" if path else key
        if field is None:
            what = f"{_unknown_field(key, descriptor)} (at {where})"
            raise ConfigError(what, field=where, source=CONFIG_OVERRIDE)
        if field.name in seen:
            raise ConfigError(f"{where} is given in both spellings", field=where, source=CONFIG_OVERRIDE)
        seen.add(field.name)
        if value is not None:
            _check_value(field, value, where)


def _check_value(field: FieldDescriptor, value: object, path: str) -> None:
    message = field.message_type
    if message is None:
        return
    if message.GetOptions().map_entry:
        entry = message.fields_by_name["value"].message_type
        if entry is not None and isinstance(value, dict):
            for key, item in value.items():
                _check_tree(item, entry, f'{path}["{key}"]')
    elif not field.is_repeated:
        _check_tree(value, message, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_tree(item, message, f"{path}[{index}]")
