"""What the values of the fronts' flags say: restricted groups of RPCs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sluice_server.flag_values import SettingsError
from sluice_server.security.restrictions import GROUPS, Restriction

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

GRPC_PREFIX = "triton-grpc-protocol-"
"""What Triton puts before a key to make the name of a gRPC header of it."""

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


def _restrictions(entries: Sequence[str], flag: str, what: str, prefix: str) -> Mapping[str, Restriction]:
    restricted: dict[str, Restriction] = {}
    for entry in entries:
        names, _, pair = entry.partition(":")
        key, equals, value = pair.partition("=")
        # The value is a secret: no error repeats it.
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise SettingsError(
                f"{flag}={names}:{key}...: expected GROUP,GROUP,...:KEY=VALUE, where KEY can be the name of a header"
                " and VALUE is printable ASCII"
            )
        for name in names.split(","):
            if name not in GROUPS:
                raise SettingsError(f"{flag}: there is no group '{name}'; there are {', '.join(GROUPS)}")
            if GROUPS[name] & restricted.keys():
                raise SettingsError(f"{flag}: '{name}' is restricted twice; a group has one key")
            restricted |= dict.fromkeys(GROUPS[name], Restriction(what, prefix + key, value))
    return restricted
