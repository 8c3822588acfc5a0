"""What the values of the fronts' flags say: restricted groups of RPCs, patterns of headers."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from sluice_server.flag_values import SettingsError
from sluice_server.security.restrictions import GROUPS, Restriction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GRPC_PREFIX = "triton-grpc-protocol-"
"""What Triton puts before a key to make the name of a gRPC header of it."""

_CASE_MATTERS = "(?-i)"

_KEY = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""A header's name (RFC 9110, 5.6.2)."""

_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
"""What both gRPC's metadata and HTTP's headers carry as it is: printable ASCII, no space at an end."""


def grpc_restrictions(args: argparse.Namespace) -> Mapping[str, Restriction]:
    """The restricted RPCs of gRPC, by their names; `SettingsError` names the entry that is wrong."""
    return _restrictions(args.grpc_restricted_protocol, "--grpc-restricted-protocol", "protocol", GRPC_PREFIX)


def http_restrictions(args: argparse.Namespace) -> Mapping[str, Restriction]:
    """The same of REST."""
    return _restrictions(args.http_restricted_api, "--http-restricted-api", "API", "")


def grpc_header_pattern(text: str) -> re.Pattern[str] | None:
    """A pattern for metadata, whose names are in lower case always; empty for none.

    As in Triton it matches in any case, unless it begins with `(?-i)`, which Python has for parts of patterns only.
    """
    if text.startswith(_CASE_MATTERS):
        return _compile(text.removeprefix(_CASE_MATTERS), re.NOFLAG)
    return _compile(text, re.IGNORECASE) if text else None


def http_header_pattern(text: str) -> re.Pattern[str] | None:
    """The same for headers of HTTP, of whose names the server knows no case."""
    if text.startswith(_CASE_MATTERS):
        raise argparse.ArgumentTypeError(f"{_CASE_MATTERS} cannot be kept: headers have lost their case when they come")
    return grpc_header_pattern(text)


def _compile(text: str, flags: re.RegexFlag) -> re.Pattern[str]:
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _restrictions(entries: Sequence[str], flag: str, what: str, prefix: str) -> Mapping[str, Restriction]:
    restricted: dict[str, Restriction] = {}
    for entry in entries:
        # The value, all behind the first =, is a secret: no error repeats it, whatever is wrong before it.
        told, equals, value = entry.partition("=")
        names, _, key = told.partition(":")
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise SettingsError(
                f"{flag}={told}...: expected GROUP,GROUP,...:KEY=VALUE, where KEY can be the name of a header"
                " and VALUE is printable ASCII"
            )
        for name in names.split(","):
            if name not in GROUPS:
                raise SettingsError(f"{flag}: there is no group '{name}'; there are {', '.join(GROUPS)}")
            if GROUPS[name] & restricted.keys():
                raise SettingsError(f"{flag}: '{name}' is restricted twice; a group has one key")
            restricted |= dict.fromkeys(GROUPS[name], Restriction(what, prefix + key, value))
    return restricted
