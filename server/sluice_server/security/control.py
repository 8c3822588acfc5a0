"""Who may change what the server serves: by default only a peer on this machine."""

from __future__ import annotations

import functools
import ipaddress
import urllib.parse

from sluice_server.errors import PermissionDenied

PEERS_MAX = 1024
"""Peers whose answer is kept: requests that name shared memory are checked one by one, and looking takes some us."""


class ControlPolicy:
    """Decides by the peer's address who may control the server (load, unload) and share memory with it.

    `allow_any` is `--allow-control=any`.
    """

    def __init__(self, *, allow_any: bool = False) -> None:
        self._allow_any = allow_any

    def check(self, method: str, peer: str) -> None:
        """Let a call pass, or raise `PermissionDenied`."""
        if not self._allow_any and not is_local(peer):
            raise PermissionDenied(
                f"{method} is open to clients on the server's own machine only, and this one is {peer};"
                " start the server with --allow-control=any to open it to all"
            )


@functools.lru_cache(PEERS_MAX)
def is_local(peer: str) -> bool:
    """Whether a peer as gRPC writes it (`ipv4:127.0.0.1:1`, `ipv6:[::1]:1`, `unix:`) is on this machine."""
    scheme, _, rest = urllib.parse.unquote(peer).partition(":")
    if scheme == "unix":
        return True
    if scheme not in ("ipv4", "ipv6"):
        return False
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
