"""Makes variants of envoy.yaml: other addresses, several replicas, with or without TLS, tokens, traces.

There is one configuration, the committed file, which is itself the variant of one pod. A variant changes what it must
in it and leaves the rest, so that the tests and `make sidecar` run what users take to Kubernetes.
"""

from __future__ import annotations

import copy
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

HERE: Final = Path(__file__).resolve().parent
SOURCE: Final = HERE / "envoy.yaml"
DESCRIPTORS: Final = HERE / "descriptors.binpb"

UNIX_PREFIX: Final = "unix:"
RETRIES_MAX: Final = 2
"""A request that three replicas could not take is not helped by a fourth."""

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where one replica listens: `unix:/path` or `host:port` for gRPC, `host:port` for REST, which may be left out."""

    grpc: str
    rest: str = ""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The proxy's own certificate and key, and whom clients' certificates must be signed by, all PEM."""

    certificate: Path
    key: Path
    client_ca: Path


@dataclass(frozen=True, slots=True)
class TokenIssuer:
    """Whose tokens are taken: the claims `iss` and `aud`, and the file with the public keys (JWKS)."""

    issuer: str
    audience: str
    jwks: Path


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from the committed file; an address with port 0 is any that is free.

    `collector` is the `host:port` of an OTLP receiver (gRPC). `rate` is requests/s, with a burst of as many; None
    leaves the file's bound. `max_requests` is how many may be in flight at the replicas. `access_log` is a file that
    can be written to.
    """

    upstreams: tuple[Upstream, ...]
    listen: str = "127.0.0.1:0"
    readiness: str = "127.0.0.1:0"
    admin: str = "127.0.0.1:0"
    tls: TlsFiles | None = None
    tokens: TokenIssuer | None = None
    collector: str = ""
    trace_percent: float = 100.0
    rate: int | None = None
    max_requests: int | None = None
    access_log: str = "/dev/stdout"
    descriptors: Path = DESCRIPTORS


def bootstrap(variant: Variant) -> Config:
    """Envoy's configuration for a variant, as plain data; ValueError for an address that is none."""
    if not variant.upstreams:
        raise ValueError("there must be at least one upstream")
    with SOURCE.open() as file:
        # PyYAML makes one object of all that refer to one anchor; a change must stay where it is made.
        config: Config = _unshared(yaml.safe_load(file))
    config["admin"]["address"] = address(variant.admin)
    edge, readiness = (_named(config["static_resources"]["listeners"], name) for name in ("edge", "readiness"))
    edge["address"] = address(variant.listen)
    readiness["address"] = address(variant.readiness)
    (chain,) = edge["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    manager["access_log"][0]["typed_config"]["path"] = variant.access_log
    _filter(manager, "grpc_json_transcoder")["proto_descriptor"] = str(variant.descriptors)
    _set_tls(chain, manager, variant.tls)
    _set_tokens(manager, variant.tokens)
    _set_tracing(config, manager, variant)
    _set_rate(manager, variant.rate)
    _set_upstreams(config, manager, variant)
    return config


def address(text: str) -> Config:
    """`unix:/path` or `host:port` in Envoy's words; ValueError for anything else."""
    if text.startswith(UNIX_PREFIX):
        return {"pipe": {"path": text.removeprefix(UNIX_PREFIX)}}
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise ValueError(f"{text!r} is no address: expected host:port or unix:/path")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _set_tls(chain: Config, manager: Config, tls: TlsFiles | None) -> None:
    if tls is None:
        del chain["transport_socket"], manager["forward_client_cert_details"]
        del manager["set_current_client_cert_details"]
        return
    context = chain["transport_socket"]["typed_config"]["common_tls_context"]
    (pair,) = context["tls_certificates"]
    pair["certificate_chain"]["filename"] = str(tls.certificate)
    pair["private_key"]["filename"] = str(tls.key)
    context["validation_context"]["trusted_ca"]["filename"] = str(tls.client_ca)


def _set_tokens(manager: Config, tokens: TokenIssuer | None) -> None:
    if tokens is None:
        manager["http_filters"].remove(_named(manager["http_filters"], "envoy.filters.http.jwt_authn"))
        return
    provider = _filter(manager, "jwt_authn")["providers"]["clients"]
    provider["issuer"] = tokens.issuer
    provider["audiences"] = [tokens.audience]
    provider["local_jwks"]["filename"] = str(tokens.jwks)


def _set_tracing(config: Config, manager: Config, variant: Variant) -> None:
    clusters = config["static_resources"]["clusters"]
    cluster = _named(clusters, "otel_collector")
    if not variant.collector:
        clusters.remove(cluster)
        del manager["tracing"]
        return
    manager["tracing"]["random_sampling"]["value"] = variant.trace_percent
    _set_endpoints(cluster, [variant.collector])


def _set_rate(manager: Config, rate: int | None) -> None:
    if rate is not None:
        (host,) = manager["route_config"]["virtual_hosts"]
        limit = host["typed_per_filter_config"]["envoy.filters.http.local_ratelimit"]
        limit["token_bucket"] = {"max_tokens": rate, "tokens_per_fill": rate, "fill_interval": "1s"}


def _set_upstreams(config: Config, manager: Config, variant: Variant) -> None:
    clusters = config["static_resources"]["clusters"]
    for name in ("sluice", "sluice_sequences"):
        cluster = _named(clusters, name)
        _set_endpoints(cluster, [one.grpc for one in variant.upstreams])
        if variant.max_requests is not None:
            (thresholds,) = cluster["circuit_breakers"]["thresholds"]
            thresholds["max_requests"] = variant.max_requests
    (host,) = manager["route_config"]["virtual_hosts"]
    _set_retries(_named(host["routes"], "unary"), len(variant.upstreams))
    rest = [one.rest for one in variant.upstreams if one.rest]
    if rest:
        _set_endpoints(_named(clusters, "sluice_rest"), rest)
        return
    clusters.remove(_named(clusters, "sluice_rest"))
    for name in ("rest", "closed_rest"):
        host["routes"].remove(_named(host["routes"], name))


def _set_retries(route: Config, replicas: int) -> None:
    """With several replicas, what one refuses as its queue is full is tried at another: its push-back is of its queue.

    Never again at the same one, as Envoy could not wait for the push-back, which is in milliseconds.
    """
    if replicas > 1:
        policy = route["route"]["retry_policy"]
        policy["retry_on"] += ",resource-exhausted"
        policy["num_retries"] = min(RETRIES_MAX, replicas - 1)


def _set_endpoints(cluster: Config, addresses: list[str]) -> None:
    endpoints = [address(one) for one in addresses]
    cluster["type"] = "STATIC" if all(map(_is_fixed, endpoints)) else "STRICT_DNS"
    (locality,) = cluster["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [{"endpoint": {"address": one}} for one in endpoints]


def _is_fixed(endpoint: Config) -> bool:
    """Whether there is no name in it to look up."""
    if "pipe" in endpoint:
        return True
    try:
        ipaddress.ip_address(endpoint["socket_address"]["address"])
    except ValueError:
        return False
    return True


def _named(items: list[Config], name: str) -> Config:
    (found,) = [item for item in items if item["name"] == name]
    return found


def _filter(manager: Config, name: str) -> Config:
    found: Config = _named(manager["http_filters"], f"envoy.filters.http.{name}")["typed_config"]
    return found


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_unshared(one) for one in value]
    return copy.copy(value)
