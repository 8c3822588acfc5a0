"""Where the servers are: the written forms of an endpoint and what gRPC needs to know about each.

host:port               plain, or TLS when the client has Tls
host                    the same on port 8001
grpc://host:port        plain, said explicitly
grpcs://host:port       TLS (with Tls() when the client was given none)
dns:///name:port        all addresses of the name, requests spread over them
ipv4:..., ipv6:...      addresses, as gRPC writes them
unix:///path            a Unix domain socket
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sluice_client.errors import InvalidRequest
from sluice_client.settings import DEFAULT_PORT

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/?#@\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: `text` as it was given, `target` for gRPC, `secure` when TLS is used, `spread` over all addresses."""

    text: str
    target: str
    secure: bool
    spread: bool = False

    def __str__(self) -> str:
        return self.text


def parse_endpoints(endpoints: str | Sequence[str], *, tls: bool) -> tuple[Endpoint, ...]:
    """Read one endpoint or several. InvalidRequest for an unknown form, none at all, or the same one twice."""
    texts = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    if not texts:
        raise InvalidRequest("no endpoint was given; one looks like 'localhost:8001'")
    parsed = tuple(parse_endpoint(text, tls=tls) for text in texts)
    for index, endpoint in enumerate(parsed):
        if any(endpoint.target == earlier.target for earlier in parsed[:index]):
            raise InvalidRequest(f"endpoint {endpoint.text!r} is given twice")
    return parsed


def parse_endpoint(text: str, *, tls: bool) -> Endpoint:
    """Read one endpoint; `tls` says whether the client has TLS material."""
    if not isinstance(text, str):
        raise InvalidRequest(f"an endpoint is a string like 'localhost:8001', got {type(text).__name__}")
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.strip("/"):
        # gRPC reads unix:///path and unix:path; both stay as they are.
        return Endpoint(text, text, secure=tls)
    if scheme in ("ipv4", "ipv6") and rest:
        return Endpoint(text, text, secure=tls, spread=True)
    if scheme == "dns" and rest.startswith("///"):
        return Endpoint(text, "dns:///" + _authority(text, rest[3:]), secure=tls, spread=True)
    if scheme in ("grpc", "grpcs") and rest.startswith("//"):
        if tls and scheme == "grpc":
            raise InvalidRequest(f"endpoint {text!r} asks for no TLS, but the client was given Tls")
        return Endpoint(text, _authority(text, rest[2:].removesuffix("/")), secure=scheme == "grpcs")
    if scheme in ("http", "https") and rest.startswith("//"):
        better = "grpcs" if scheme == "https" else "grpc"
        raise InvalidRequest(f"endpoint {text!r} is a web address; this client speaks gRPC: use {better}://host:port")
    return Endpoint(text, _authority(text, text), secure=tls)


def _authority(text: str, authority: str) -> str:
    """`host:port` with the default port filled in."""
    match = _HOST_PORT.fullmatch(authority)
    if match is None:
        raise InvalidRequest(
            f"endpoint {text!r} is not understood; write host:port, [ipv6]:port, grpc(s)://host:port, dns:///name:port "
            "or unix:///path"
        )
    port = int(match["port"] or DEFAULT_PORT)
    if not 0 < port <= _MAX_PORT:
        raise InvalidRequest(f"endpoint {text!r}: {port} is not a port")
    return f"{match['host']}:{port}"
