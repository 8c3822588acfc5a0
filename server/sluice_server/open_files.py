"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource

OPEN_FILES_MAX = 65_536
"""Several times the connections that a transport takes; some containers allow a thousand million."""


def raise_limit() -> int:
    """Raise the soft limit, often 1,024 for the sake of old programs, as far as this process may; gives what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft
