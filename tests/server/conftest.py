"""Fixtures of the tests of whole servers: a server that they share."""

from support.shared_server import refused, server, shared_server

__all__ = ["refused", "server", "shared_server"]
