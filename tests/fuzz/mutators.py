"""Changes of inputs that leave them in one piece: of a protobuf message a field, of a JSON text a value.

Of a message with a byte changed anywhere most are no message any more, and are refused at the door.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from fuzz.subject import MESSAGE_BYTES_MAX, joined, parted
from sluice_proto.errors import WireError
from sluice_proto.wire import _read_varint, _varint, length_delimited

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    Mutate = Callable[[bytes], bytes]
    """The fuzzer's own change of bytes."""
    Mutator = Callable[[bytes, Random, Mutate], bytes]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SIZES = {FIXED64: 8, FIXED32: 4}
NUMBER_BYTES_MAX = 10

NUMBERS = (0, 1, 2, 3, 4, 8, 16, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, 2**31, 2**63, 2**64, 1e300, math.inf, "", "1", "X", "\u00e9", "\ud800", [], {},
    [[]], [None], {"a": 1}, [0, 1],
)  # fmt: skip

Field = tuple[int, int, bytes]
"""Number, wire type, and what it holds: of bytes those, of numbers the number as it is written."""


def split(data: bytes) -> list[Field] | None:
    """The fields of a message; None when it is none."""
    whole = memoryview(data)
    fields: list[Field] = []
    offset = 0
    try:
        while offset < len(data):
            tag, start = _read_varint(whole, offset, NUMBER_BYTES_MAX)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == BYTES:
                length, start = _read_varint(whole, start, NUMBER_BYTES_MAX)
                offset = start + length
            elif wire_type == VARINT:
                _, offset = _read_varint(whole, start, NUMBER_BYTES_MAX)
            elif wire_type in SIZES:
                offset = start + SIZES[wire_type]
            else:
                return None
            if offset > len(data) or not number:
                return None
            fields.append((number, wire_type, data[start:offset]))
    except WireError:
        return None
    return fields


def unite(fields: list[Field]) -> bytes:
    """The message of its fields."""
    return b"".join(
        length_delimited(number, len(held)) + held if kind == BYTES else _varint(number << 3 | kind) + held
        for number, kind, held in fields
    )


def change_message(data: bytes, random: Random, mutate: Mutate) -> bytes:
    """Change, drop, repeat or move one field of a message, or of one within it; other bytes are changed anyhow."""
    fields = split(data)
    if not fields:
        return mutate(data)
    place = random.randrange(len(fields))
    match random.randrange(10):
        case 0:
            del fields[place]
        case 1:
            fields.insert(random.randrange(len(fields) + 1), fields[place])
        case 2:
            fields.append(fields.pop(place))
        case _:
            fields[place] = _change_field(fields[place], random, mutate)
    return unite(fields)


def _change_field(field: Field, random: Random, mutate: Mutate) -> Field:
    number, kind, held = field
    if kind == BYTES:
        if random.randrange(4) and split(held):
            return number, kind, change_message(held, random, mutate)
        return number, kind, _change_bytes(held, random, mutate)
    if kind == VARINT:
        return number, kind, _varint(random.choice(NUMBERS))
    return number, kind, mutate(held).ljust(SIZES[kind], b"\0")[: SIZES[kind]]


def _change_bytes(held: bytes, random: Random, mutate: Mutate) -> bytes:
    """What was text stays text, most often: protobuf parses no message with other bytes there."""
    changed = mutate(held)
    try:
        held.decode()
    except UnicodeDecodeError:
        return changed
    return changed.decode(errors="replace").encode() if random.randrange(8) else changed


def change_json(data: bytes, random: Random, mutate: Mutate) -> bytes:
    """Change or drop one value of a JSON text, or put another of its values there; what is none is changed anyhow."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(data)
    places = list(_places(tree))
    if not places:
        return mutate(data)
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, other_key = random.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        case 2 if isinstance(holder[key], str):
            holder[key] = mutate(holder[key].encode(errors="replace")).decode("latin-1")
        case _:
            holder[key] = random.choice(ODD_VALUES)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Any:
    """Every member and element of a JSON value, and of those within it: what holds it, and where."""
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])


def behind(count: int, mutator: Mutator) -> Mutator:
    """Leave the first bytes as they are, most often."""

    def change(data: bytes, random: Random, mutate: Mutate) -> bytes:
        if not random.randrange(10):
            return mutate(data)
        return data[:count] + mutator(data[count:], random, mutate)

    return change


def in_one(mutator: Mutator) -> Mutator:
    """Change one of the messages of an input, or their order."""

    def change(data: bytes, random: Random, mutate: Mutate) -> bytes:
        messages = parted(data)
        if not messages:
            return mutate(data)
        place = random.randrange(len(messages))
        match random.randrange(10):
            case 0:
                messages.append(messages[place])
            case 1:
                messages.append(messages.pop(place))
            case _:
                messages[place] = mutator(messages[place], random, mutate)
        return joined([message[:MESSAGE_BYTES_MAX] for message in messages])

    return change
