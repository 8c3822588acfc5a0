"""Transports: who owns sockets, HTTP/2, gRPC framing and TLS, behind one seam (`call.py`)."""

from sluice_server.transport.call import Call, ListenError, Metadata, Stream, Transport

__all__ = ["Call", "ListenError", "Metadata", "Stream", "Transport"]
