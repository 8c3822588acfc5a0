"""Whether an address can be listened on, tried with a plain socket first: it knows the reason, which gRPC only logs."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from sluice_server.transport.call import ListenError
from sluice_server.transport.options import UNIX_PREFIX


def check_address(address: str, *, reuse_port: bool = False) -> None:
    """Raise `ListenError` with the reason when nothing can listen on `host:port`, `[ipv6]:port` or `unix:path` now."""
    try:
        if address.startswith(UNIX_PREFIX):
            _check_directory(Path(address.removeprefix(UNIX_PREFIX).removeprefix("//")).parent)
        else:
            host, _, port = address.rpartition(":")
            listen(host, int(port), reuse_port=reuse_port).close()
    except OSError as error:
        raise ListenError(f"cannot listen on {address} for gRPC: {reason(error)}") from error


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Give a listening socket; `host` is a name or an address, with or without the brackets of IPv6. OSError."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=reuse_port)


def reason(error: OSError) -> str:
    """What the system says, without the address that Python adds to it, or the number that Rust does."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return (error.strerror or str(error)).partition(" (while ")[0].partition(" (os error ")[0]
    return os.strerror(error.errno)


def _check_directory(directory: Path) -> None:
    """Look only: a socket that is left there from before is gRPC's to replace."""
    directory.stat()
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
