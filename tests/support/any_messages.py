"""Protobuf messages of any type with strange values in any of their fields, for Hypothesis."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

FIELDS_MAX = 6
"""Fields that are set in one message: with more, all but the first that is wrong are never reached."""

ITEMS_MAX = 3
DEPTH_MAX = 5
"""Messages within messages; configurations need four."""

EDGES = (0, 1, -1, 2, 3, 4, 8, 16, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
BITS = {32: (-(2**31), 2**31 - 1), 64: (-(2**63), 2**63 - 1)}
UNSIGNED = {32: (0, 2**32 - 1), 64: (0, 2**64 - 1)}

_F = FieldDescriptor
_RANGES: dict[int, tuple[int, int]] = {
    **dict.fromkeys((_F.TYPE_INT32, _F.TYPE_SINT32, _F.TYPE_SFIXED32), BITS[32]),
    **dict.fromkeys((_F.TYPE_INT64, _F.TYPE_SINT64, _F.TYPE_SFIXED64), BITS[64]),
    **dict.fromkeys((_F.TYPE_UINT32, _F.TYPE_FIXED32), UNSIGNED[32]),
    **dict.fromkeys((_F.TYPE_UINT64, _F.TYPE_FIXED64), UNSIGNED[64]),
}
ENUM_NUMBERS = (-1, 99, 2**31 - 1)
"""Values that no enum has a name for."""


def any_message(message: type[Message], words: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """Messages of a type with any of their fields set. `words` are text that means something where it is read."""
    return st.composite(_draw_message)(message.DESCRIPTOR, tuple(words), DEPTH_MAX)  # type: ignore[no-any-return]


def _draw_message(draw: st.DrawFn, descriptor: Descriptor, words: tuple[str, ...], depth: int) -> Message:
    built: Message = GetMessageClass(descriptor)()
    _fill(draw, built, descriptor, words, depth)
    return built


def _fill(draw: st.DrawFn, built: Any, descriptor: Descriptor, words: tuple[str, ...], depth: int) -> None:
    fields = [field for field in descriptor.fields if depth or field.message_type is None]
    if not fields:
        return
    for field in draw(st.lists(st.sampled_from(fields), max_size=min(FIELDS_MAX, len(fields)), unique=True)):
        target = getattr(built, field.name)
        if _is_map(field):
            _fill_map(draw, target, field, words, depth)
        elif field.message_type is not None:
            places = [target.add() for _ in range(draw(st.integers(1, ITEMS_MAX)))] if field.is_repeated else [target]
            for place in places:
                if not field.is_repeated:
                    place.SetInParent()
                _fill(draw, place, field.message_type, words, depth - 1)
        elif field.is_repeated:
            target.extend(draw(st.lists(scalars(field, words), max_size=ITEMS_MAX)))
        else:
            setattr(built, field.name, draw(scalars(field, words)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _fill_map(draw: st.DrawFn, target: Any, field: FieldDescriptor, words: tuple[str, ...], depth: int) -> None:
    key_field, value_field = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for key in draw(st.lists(scalars(key_field, words), max_size=ITEMS_MAX, unique=True)):
        if value_field.message_type is None:
            target[key] = draw(scalars(value_field, words))
        else:
            target[key].SetInParent()
            _fill(draw, target[key], value_field.message_type, words, depth - 1)


@cache
def scalars(field: FieldDescriptor, words: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Values of a field that is no message."""
    if field.type in _RANGES:
        least, most = _RANGES[field.type]
        return st.sampled_from([edge for edge in EDGES if least <= edge <= most]) | st.integers(least, most)
    if field.enum_type is not None:
        return st.sampled_from([*(value.number for value in field.enum_type.values), *ENUM_NUMBERS])
    others: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
        _F.TYPE_BOOL: st.booleans,
        _F.TYPE_FLOAT: lambda: st.floats(width=32),
        _F.TYPE_DOUBLE: st.floats,
        _F.TYPE_BYTES: lambda: st.binary(max_size=80),
        _F.TYPE_STRING: lambda: text(words),
    }
    return others[field.type]()


def text(words: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Text, most often one of the words."""
    strange = st.text(max_size=6) | st.sampled_from(["", "\0", "\u00e9", "\n", "%s", "..", "a/b", "x" * 300])
    return st.sampled_from(words) | st.sampled_from(words) | strange if words else strange
