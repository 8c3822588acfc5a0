"""Versions of a model: which of the folders a policy serves, and how a request names one."""

import re
from collections.abc import Iterable
from typing import Final

from sluice_proto.model_config_pb2 import ModelVersionPolicy
from sluice_server.errors import InvalidArgument

MAX_VERSION: Final = 2**63 - 1
"""Versions are int64 in the protocol."""

_DIGITS: Final = len(str(MAX_VERSION))
_INTEGER: Final = re.compile(r"-?[0-9]+", re.ASCII)
_SHOWN_CHARACTERS: Final = 40  # a message repeats no more of what a client sent


def select(policy: ModelVersionPolicy | None, available: Iterable[int]) -> tuple[int, ...]:
    """Give the versions, in rising order, that `policy` serves of those available; without a choice the latest."""
    versions = sorted(set(available))
    policy = policy or ModelVersionPolicy()
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return tuple(versions)
    if choice == "specific":
        wanted = set(policy.specific.versions)
        return tuple(version for version in versions if version in wanted)
    return tuple(versions[-max(policy.latest.num_versions, 1) :])


def parse_version(text: str) -> int | None:
    """Read the version of a request: None for "" (the latest one); 0 parses and is then just not there.

    Raises InvalidArgument when the text is no integer of 64 bits, or a negative one.
    """
    if not text:
        return None
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    digits = text.lstrip("-0")  # of any length: counted before they become a number
    if not _INTEGER.fullmatch(text) or len(digits) > _DIGITS or int(digits or 0) > MAX_VERSION:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{shown}', "
            "version should be an integral value > 0"
        )
    if text.startswith("-") and digits:
        raise InvalidArgument(f"invalid model version specified '{shown}' , version should be an integral value > 0")
    return int(digits or 0)
