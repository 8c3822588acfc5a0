"""The peer that shows what gRPC itself costs: a bare grpcio asyncio server that answers each request with its bytes."""

import argparse
import asyncio
from typing import Any

import grpc
import grpc.aio

MESSAGE_BYTES_MAX = 2**31 - 1
"""As in the server under test: both have the same message size limits."""


async def echo(message: bytes, _context: Any) -> bytes:
    """Answer with the request's bytes."""
    return message


class EchoHandler(grpc.GenericRpcHandler):  # type: ignore[misc] # grpcio has no type hints
    """Echoes whatever method is called, without parsing anything."""

    _handler = grpc.unary_unary_rpc_method_handler(echo)

    def service(self, _details: Any) -> Any:
        """The same handler for every method."""
        return self._handler


async def serve(port: int) -> None:
    """Serve until the process ends."""
    options = [
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((EchoHandler(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))
