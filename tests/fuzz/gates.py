"""Fuzzed here: restricted groups of RPCs, from the flag's text to the calls that may pass."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from sluice_server.flag_values import SettingsError
from sluice_server.front_flags import GRPC_PREFIX, grpc_restrictions
from sluice_server.protocol.restricted import RestrictedHandler
from sluice_server.protocol.rpcs import SERVICE, path_of
from sluice_server.security.restrictions import GROUPS
from sluice_server.status import Code
from support.fakes import RecordingCall, RecordingStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sluice_server.transport.call import Call

PATHS = (*(path_of(method.name) for method in SERVICE.methods), "/grpc.health.v1.Health/Check", "/nobody/Knows")
STREAMED = path_of("ModelStreamInfer")
SECRET = "open sesame"


class Gates:
    """Two values of the flag, a header and its value, each on a line of its own: with that all RPCs are tried."""

    def check(self, data: bytes) -> None:
        """What passes is what a second reading of the flag lets pass; the others end, and are told nothing secret."""
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        flags, (name, value) = lines[:2], (*lines[2:4], "", "")[:2]
        try:
            restricted = grpc_restrictions(argparse.Namespace(grpc_restricted_protocol=flags))
        except SettingsError as error:
            self._judge_refusal(str(error), flags)
            return
        passed: list[Call] = []
        gate = RestrictedHandler(Recorder(passed), PATHS, restricted)
        calls = [self._call(path, name, value) for path in PATHS]
        gate(calls)
        wanted = wanted_headers(flags)
        for path, call in zip(PATHS, calls, strict=True):
            header = wanted.get(path.rpartition("/")[2])
            assert (call in passed) == (header is None or header == (name, value)), (path, header)
            ends = [end for end, _ in call.ends] if isinstance(call, RecordingCall) else call.stream.ends
            if call in passed:
                assert not ends
                continue
            (status,) = ends
            assert status.code is Code.UNAVAILABLE
            assert header is not None
            assert (
                status.message
                == f"This protocol is restricted, expecting header '{GRPC_PREFIX}{told_key(flags, path)}'"
            )

    @staticmethod
    def _judge_refusal(text: str, flags: list[str]) -> None:
        """What stands behind the first = is a secret."""
        assert text
        assert SECRET not in text or any(SECRET in flag.partition("=")[0] for flag in flags)

    @staticmethod
    def _call(path: str, name: str, value: str) -> Call:
        metadata = (("user-agent", "fuzz"), (name, value))
        if path == STREAMED:
            return RecordingStream(path, metadata=metadata).message(b"")
        return RecordingCall(b"", path, metadata=metadata)

    def look(self) -> None:
        """The usual flag is kept."""
        for line in gate_seeds():
            self.check(line)


class Recorder:
    """The handler behind the gate."""

    def __init__(self, passed: list[Call]) -> None:
        self._passed = passed

    def __call__(self, calls: Sequence[Call], /, *, lend: bool = False) -> Callable[[], None] | None:
        self._passed.extend(calls)
        return None


def told_key(flags: list[str], path: str) -> str:
    """The key of the flag that restricts an RPC, as it was written."""
    rpc = path.rpartition("/")[2]
    for flag in flags:
        groups, _, pair = flag.partition(":")
        if any(rpc in GROUPS[group] for group in groups.split(",")):
            return pair.partition("=")[0]
    raise AssertionError(f"{path} is not restricted")


def wanted_headers(flags: list[str]) -> dict[str, tuple[str, str]]:
    """By the names of RPCs, the header that each needs: a second reading of valid flags."""
    wanted = {}
    for flag in flags:
        told, value = flag.split("=", 1)
        groups, key = told.split(":")
        for group in groups.split(","):
            wanted |= dict.fromkeys(GROUPS[group], (f"{GRPC_PREFIX}{key}".lower(), value))
    return wanted


def gate_seeds() -> list[bytes]:
    """Each group, alone and with others; with the right header, a wrong one and none."""
    names = list(GROUPS)
    texts = [f"{name}:key={SECRET}\n{names[0]}x:a=b" for name in names]
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        flags = f"{first}:Key={SECRET}\n{second}:other=1"
        texts += [f"{flags}\n{GRPC_PREFIX}key\n{SECRET}", f"{flags}\n{GRPC_PREFIX}other\n2", f"{flags}\n\n"]
    return [text.encode() for text in [*texts, f"{','.join(names)}:k=v\n"]]


@st.composite
def built_gates(draw: st.DrawFn) -> bytes:
    """Flags that are nearly right, and headers that are those of one of them most often."""
    flags, pairs = [], [("", "")]
    for _ in range(2):
        groups = draw(st.lists(st.sampled_from([*GROUPS, "nope", ""]), min_size=1, max_size=3))
        key = draw(st.sampled_from(["key", "Key", "a-b", "", "k y"]) | st.text(max_size=4))
        value = draw(st.sampled_from([SECRET, "v", "", " v", "a=b:c", "\u00e9"]) | st.text(max_size=4))
        flags.append(f"{','.join(groups)}:{key}={value}")
        pairs.append((f"{GRPC_PREFIX}{key}".lower(), value))
    name, value = draw(st.sampled_from(pairs))
    lines = [*flags, name, draw(st.sampled_from([value, value, value + " ", value[:-1]]))]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@contextmanager
def open_gates(_directory: Path) -> Iterator[Gates]:
    yield Gates()
