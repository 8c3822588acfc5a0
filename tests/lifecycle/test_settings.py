"""`sluice serve`'s command line: what each flag becomes, and what is refused by name."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from sluice_batching import Resource
from sluice_server import server_flags
from sluice_server.flag_values import SettingsError
from sluice_server.observability.latencies import LatencyOptions
from sluice_server.observability.metrics import MetricsOptions
from sluice_server.refused_flags import REFUSED
from sluice_server.repository.manager import ControlMode
from sluice_server.security.restrictions import Restriction
from sluice_server.settings import HttpSettings, parse_serve
from sluice_server.transport.choice import TransportChoice
from sluice_server.transport.options import Compression, TlsFiles, TransportOptions

REPOSITORY = "--model-repository=/models"

TLS = ["--grpc-server-cert=c.pem", "--grpc-server-key=k.pem"]

GRPC_KEY = "triton-grpc-protocol-k"


def restricted(what: str, header: str, value: str = "v") -> Restriction:
    return Restriction(what, header, value)


# (flags, where in the settings, what stands there)
FLAGS = [
    ([], "models.repositories", (Path("/models"),)),
    (["--model-repository=/more"], "models.repositories", (Path("/models"), Path("/more"))),
    (["--model-store", "/more"], "models.repositories", (Path("/models"), Path("/more"))),
    (["--trace-config=rate=7"], "trace.options.rate", 7),
    ([], "capture", None),
    (["--capture-file=/tmp/c"], "capture.file", Path("/tmp/c")),
    (["--capture-file=c", "--capture-rate=0.01"], "capture.rate", 0.01),
    (["--capture-file=c", "--capture-max-bytes=1000"], "capture.max_bytes", 1000),
    (["--capture-file=c", "--capture-redact=json:dumps"], "capture.redact", json.dumps),
    ([], "models.control_mode", ControlMode.NONE),
    (["--model-control-mode=none"], "models.control_mode", ControlMode.NONE),
    (["--model-control-mode=explicit"], "models.control_mode", ControlMode.EXPLICIT),
    (["--model-control-mode=poll"], "models.control_mode", ControlMode.POLL),
    ([], "models.poll_interval_s", 15.0),
    (["--model-control-mode=poll", "--repository-poll-secs=2"], "models.poll_interval_s", 2.0),
    (["--model-control-mode=explicit", "--load-model=a", "--load-model=b"], "models.load_models", ("a", "b")),
    (["--model-control-mode", "explicit", "--load-model", "*"], "models.load_models", ("*",)),
    ([], "models.load_threads", 4),
    (["--model-load-thread-count=2"], "models.load_threads", 2),
    (["--model-load-thread-count=0"], "models.load_threads", 1),
    ([], "models.auto_complete", True),
    (["--disable-auto-complete-config"], "models.auto_complete", False),
    (["--strict-model-config=true"], "models.auto_complete", False),
    (["--strict-model-config=false"], "models.auto_complete", True),
    (["--strict-model-config=false", "--disable-auto-complete-config"], "models.auto_complete", False),
    ([], "models.config_name", ""),
    (["--model-config-name=large"], "models.config_name", "large"),
    ([], "models.load_retries", 0),
    (["--model-load-retry-count=3"], "models.load_retries", 3),
    ([], "models.default_max_batch_size", 4),
    (["--backend-config=onnxruntime,default-max-batch-size=16"], "models.default_max_batch_size", 16),
    (["--backend-config", ",default-max-batch-size=0"], "models.default_max_batch_size", 0),
    ([], "models.allow_provider_fallback", False),
    (["--allow-provider-fallback"], "models.allow_provider_fallback", True),
    ([], "models.queue_rows", server_flags.QUEUE_ROWS_DEFAULT),
    (["--default-queue-rows=0"], "models.queue_rows", 0),
    (["--default-queue-bytes=1024"], "models.queue_bytes", 1024),
    ([], "models.rate_limit", None),
    (["--rate-limit=off"], "models.rate_limit", None),
    (["--rate-limit=execution_count"], "models.rate_limit", {}),
    (
        ["--rate-limit=execution_count", "--rate-limit-resource=R1:10", "--rate-limit-resource=R1:8:1"],
        "models.rate_limit",
        {Resource("R1"): 10, Resource("R1", 1): 8},
    ),
    ([], "models.curve_directory", None),
    (["--batch-curve-cache=/var/cache/sluice"], "models.curve_directory", Path("/var/cache/sluice")),
    ([], "models.cache_bytes", 0),
    (["--cache-config=local,size=1048576"], "models.cache_bytes", 1 << 20),
    (["--cache-config", "local,size=0"], "models.cache_bytes", 0),
    (["--response-cache-byte-size=4096"], "models.cache_bytes", 4096),
    ([], "grpc.address", "0.0.0.0:8001"),
    (["--grpc-address=127.0.0.1", "--grpc-port=1"], "grpc.address", "127.0.0.1:1"),
    (["--grpc-address=::1"], "grpc.address", "[::1]:8001"),
    (["--grpc-address=[::]"], "grpc.address", "[::]:8001"),
    (["--grpc-address=unix:/run/sluice"], "grpc.address", "unix:/run/sluice"),
    ([], "grpc.reuse_port", False),
    (["--reuse-grpc-port=true"], "grpc.reuse_port", True),
    ([], "grpc", TransportOptions()),
    ([], "transport", TransportChoice.AUTO),
    (["--transport=native"], "transport", TransportChoice.NATIVE),
    (["--transport=grpcio"], "transport", TransportChoice.GRPCIO),
    ([], "native_flags", ()),
    (
        ["--grpc-stall-timeout=1", "--grpc-max-connections=1"],
        "native_flags",
        ("--grpc-stall-timeout", "--grpc-max-connections"),
    ),
    (["--grpc-address=unix:/run/sluice", "--grpc-unix-mode=660"], "grpc.unix_mode", 0o660),
    (TLS, "grpc.tls", None),
    ([*TLS, "--grpc-use-ssl=true"], "grpc.tls", TlsFiles(Path("c.pem"), Path("k.pem"))),
    ([*TLS, "--grpc-use-ssl=true", "--grpc-root-cert=r.pem"], "grpc.tls.client_roots", None),
    ([*TLS, "--grpc-use-ssl-mutual=true", "--grpc-root-cert=r.pem"], "grpc.tls.client_roots", Path("r.pem")),
    (["--grpc-keepalive-time=7000"], "grpc.keepalive_time_s", 7.0),
    (["--grpc-keepalive-timeout=100"], "grpc.keepalive_timeout_s", 0.1),
    (["--grpc-keepalive-permit-without-calls=true"], "grpc.keepalive_permit_without_calls", True),
    (["--grpc-http2-max-pings-without-data=0"], "grpc.http2_max_pings_without_data", 0),
    (
        ["--grpc-http2-min-recv-ping-interval-without-data=10000"],
        "grpc.http2_min_recv_ping_interval_without_data_s",
        10.0,
    ),
    (["--grpc-http2-max-ping-strikes=5"], "grpc.http2_max_ping_strikes", 5),
    (["--grpc-max-connection-age=5"], "grpc.max_connection_age_s", 0.005),
    (["--grpc-max-connection-age=0"], "grpc.max_connection_age_s", None),
    (["--grpc-max-connection-age-grace=5"], "grpc.max_connection_age_grace_s", 0.005),
    (["--grpc-infer-response-compression-level=medium"], "grpc.compression", Compression.MEDIUM),
    (["--grpc-max-concurrent-streams=100"], "grpc.max_concurrent_streams", 100),
    (["--grpc-max-message-bytes=4194304"], "grpc.max_message_bytes", 4 << 20),
    (["--grpc-max-header-bytes=8192"], "grpc.max_header_bytes", 8192),
    (["--grpc-handshake-timeout=5000"], "grpc.handshake_timeout_s", 5.0),
    ([], "grpc.intake_threads", 2),
    (["--grpc-infer-thread-count=8"], "grpc.intake_threads", 8),
    (["--grpc-infer-thread-count=8"], "native_flags", ("--grpc-infer-thread-count",)),
    (["--grpc-stall-timeout=5000"], "grpc.stall_timeout_s", 5.0),
    (["--grpc-max-connections=100"], "grpc.max_connections", 100),
    ([], "http", HttpSettings("0.0.0.0", 8000)),
    (["--http-address=::1", "--http-port=0"], "http", HttpSettings("::1", 0)),
    (["--http-address=[::1]"], "http.address", "::1"),
    ([], "http.reuse_port", False),
    (["--reuse-http-port=true"], "http.reuse_port", True),
    (["--reuse-http-port=true"], "metrics.reuse_port", False),
    (["--allow-http=false"], "http", None),
    ([], "metrics", HttpSettings("0.0.0.0", 8002)),
    (["--http-address=10.0.0.1"], "metrics", HttpSettings("10.0.0.1", 8002)),
    (["--http-address=10.0.0.1", "--metrics-address=::", "--metrics-port=1"], "metrics", HttpSettings("::", 1)),
    (["--allow-metrics=0"], "metrics", None),
    ([], "metrics_options", MetricsOptions()),
    (["--metrics-interval-ms=250"], "metrics_options.interval_ns", 250_000_000),
    (["--allow-cpu-metrics=false"], "metrics_options.cpu", False),
    (["--allow-gpu-metrics=false"], "metrics_options", MetricsOptions()),
    (["--metrics-config=counter_latencies=false"], "metrics_options.counter_latencies", False),
    (["--metrics-config=histogram_latencies=true"], "metrics_options.latencies", LatencyOptions((), histogram=True)),
    (
        ["--metrics-config", "summary_latencies=true"],
        "metrics_options.latencies.quantiles",
        (0.5, 0.9, 0.95, 0.99, 0.999),
    ),
    (
        ["--metrics-config=summary_quantiles=0.5:0.05,0.75:0.01", "--metrics-config=summary_latencies=TRUE"],
        "metrics_options.latencies.quantiles",
        (0.5, 0.75),
    ),
    ([], "grpc_restricted", {}),
    (["--grpc-restricted-protocol=trace:k=v"], "grpc_restricted", {"TraceSetting": restricted("protocol", GRPC_KEY)}),
    (
        ["--grpc-restricted-protocol=trace,logging:k=v", "--grpc-restricted-protocol", "statistics:k=v"],
        "grpc_restricted",
        dict.fromkeys(("TraceSetting", "LogSettings", "ModelStatistics"), restricted("protocol", GRPC_KEY)),
    ),
    ([], "grpc_header_pattern", None),
    (["--grpc-header-forward-pattern="], "grpc_header_pattern", None),
    (["--grpc-header-forward-pattern", "PREFIX_.*"], "grpc_header_pattern", re.compile("PREFIX_.*", re.IGNORECASE)),
    (["--grpc-header-forward-pattern=(?-i)x"], "grpc_header_pattern", re.compile("x")),
    (["--http-header-forward-pattern=^x-"], "http_header_pattern", re.compile("^x-", re.IGNORECASE)),
    ([], "http_workers", 8),
    (["--http-thread-count=2"], "http_workers", 2),
    ([], "http_restricted", {}),
    (
        ["--http-restricted-api=trace:X-Key=a=b:c"],
        "http_restricted",
        {"TraceSetting": restricted("API", "X-Key", "a=b:c")},
    ),
    ([], "http_max_input_bytes", 64 << 20),
    (["--http-max-input-size=1000"], "http_max_input_bytes", 1000),
    (["--allow-grpc=true"], "grpc.address", "0.0.0.0:8001"),
    (["--allow-grpc=false"], "grpc", None),
    (["--allow-grpc=false", "--allow-metrics=false"], "http.port", 8000),
    ([], "server_id", "triton"),
    (["--id=mine"], "server_id", "mine"),
    ([], "exit_on_error", True),
    (["--exit-on-error=false"], "exit_on_error", False),
    ([], "strict_readiness", True),
    (["--strict-readiness=FALSE"], "strict_readiness", False),
    ([], "exit_timeout_s", 30.0),
    (["--exit-timeout-secs=0"], "exit_timeout_s", 0.0),
    ([], "triton_status_codes", False),
    (["--status-codes=triton"], "triton_status_codes", True),
    ([], "allow_any_control", False),
    (["--allow-control=any"], "allow_any_control", True),
    ([], "allow_client_shm", False),
    (["--allow-client-shm"], "allow_client_shm", True),
    (["--allow-client-shm=true"], "allow_client_shm", True),
    (["--allow-client-shm", "false"], "allow_client_shm", False),
    ([], "log.format", "default"),
    (["--log-format=json"], "log.format", "json"),
    (["--log-info=false"], "log.info", False),
    (["--log-warning=off"], "log.warning", False),
    (["--log-error=0"], "log.error", False),
    (["--log-verbose=2"], "log.verbose_level", 2),
    (["--log-file=/var/log/sluice"], "log.file", Path("/var/log/sluice")),
]

WRONG = [
    (["--grpc-port=65536"], "--grpc-port"),
    (["--grpc-port=-1"], "--grpc-port"),
    (["--http-port=abc"], "--http-port"),
    (["--http-max-input-size=-1"], "--http-max-input-size"),
    (["--metrics-port="], "--metrics-port"),
    (["--grpc-port"], "--grpc-port"),
    (["--exit-timeout-secs=1.5"], "--exit-timeout-secs"),
    (["--exit-timeout-secs=-1"], "--exit-timeout-secs"),
    (["--strict-readiness=maybe"], "--strict-readiness"),
    (["--exit-on-error=2"], "--exit-on-error"),
    (["--default-queue-rows=many"], "--default-queue-rows"),
    (["--model-control-mode=sometimes"], "--model-control-mode"),
    (["--model-control-mode=poll", "--repository-poll-secs=0"], "--repository-poll-secs"),
    (["--repository-poll-secs=2"], "--repository-poll-secs"),
    (["--model-control-mode=explicit", "--repository-poll-secs=15"], "--repository-poll-secs"),
    (["--load-model=a"], "--load-model"),
    (["--allow-grpc=false", "--allow-http=false"], "--allow-grpc=false and --allow-http=false"),
    (["--model-config-name=a/b"], "--model-config-name"),
    (["--model-config-name=.."], "--model-config-name"),
    (["--model-load-retry-count=-1"], "--model-load-retry-count"),
    (["--grpc-infer-thread-count=0"], "--grpc-infer-thread-count"),
    (["--grpc-infer-thread-count=129"], "--grpc-infer-thread-count"),
    (["--transport=grpcio", "--grpc-infer-thread-count=2"], "--grpc-infer-thread-count needs the native transport"),
    (["--grpc-restricted-protocol=everything:k=v"], "no group 'everything'; there are health, metadata"),
    (["--grpc-restricted-protocol=trace"], "--grpc-restricted-protocol=trace...:"),
    (["--grpc-restricted-protocol=trace:k"], "--grpc-restricted-protocol=trace:k"),
    (["--grpc-restricted-protocol=trace:k="], "--grpc-restricted-protocol=trace:k"),
    (["--grpc-restricted-protocol=trace:k k=v"], "--grpc-restricted-protocol=trace:k k"),
    (["--http-restricted-api=trace:k=ü"], "--http-restricted-api=trace:k"),
    (["--http-restricted-api=trace:k=v", "--http-restricted-api=logging,trace:k=v"], "'trace' is restricted twice"),
    (["--grpc-header-forward-pattern=x["], "'x[' is no regular expression: unterminated character set"),
    (["--http-header-forward-pattern=(?P<"], "--http-header-forward-pattern"),
    (["--http-header-forward-pattern=(?-i)X-"], "(?-i) cannot be kept"),
    (["--http-thread-count=0"], "--http-thread-count"),
    (["--allow-gpu-metrics=true"], "metrics of GPUs are not implemented here"),
    (["--allow-cpu-metrics=some"], "--allow-cpu-metrics"),
    (["--metrics-interval-ms=-1"], "--metrics-interval-ms"),
    (["--metrics-config=gauges=true"], "--metrics-config=gauges=true is not implemented here"),
    (["--metrics-config=counter_latencies"], "--metrics-config=counter_latencies: expected true or false"),
    (["--metrics-config=summary_latencies=often"], "--metrics-config=summary_latencies=often"),
    (["--metrics-config=summary_quantiles=0.5:0.05"], "summary_quantiles needs summary_latencies=true"),
    *(
        (
            ["--metrics-config=summary_latencies=true", f"--metrics-config=summary_quantiles={text}"],
            f"quantiles={text}:",
        )
        for text in ("", "0.5", "0.5:", "half:0.1", "1.5:0.1", "0:0.1", "0.5:2", "0.5:-1", "nan:0.1", "0.5:0.1,0.5:0.2")
    ),
    (["--reuse-http-port=maybe"], "--reuse-http-port"),
    (["--strict-model-config=yes"], "--strict-model-config"),
    (["--log-format=xml"], "--log-format"),
    (["--status-codes=other"], "--status-codes"),
    (["--allow-control=some"], "--allow-control"),
    (["--allow-client-shm=1.5"], "--allow-client-shm"),
    (["--grpc-use-ssl=true"], "--grpc-server-cert"),
    (["--grpc-use-ssl=true", "--grpc-server-cert=c"], "--grpc-server-key"),
    ([*TLS, "--grpc-use-ssl-mutual=true"], "--grpc-root-cert"),
    (["--transport=rust"], "--transport"),
    (["--transport=grpcio", "--grpc-stall-timeout=60000"], "--grpc-stall-timeout"),
    (["--transport=grpcio", "--grpc-max-connections=9"], "--grpc-max-connections"),
    (["--grpc-max-connections=0"], "--grpc-max-connections"),
    (["--grpc-http2-max-ping-strikes=2147483648"], "--grpc-http2-max-ping-strikes"),
    (["--grpc-keepalive-time=true"], "--grpc-keepalive-time"),
    (["--grpc-keepalive-time=0"], "--grpc-keepalive-time"),
    (["--grpc-keepalive-timeout=2147483648"], "--grpc-keepalive-timeout"),
    (["--grpc-infer-response-compression-level=best"], "--grpc-infer-response-compression-level"),
    (["--grpc-max-message-bytes=2147483648"], "--grpc-max-message-bytes"),
    (["--grpc-unix-mode=660"], "--grpc-unix-mode"),
    (["--grpc-address=unix:/run/sluice", "--grpc-unix-mode=888"], "--grpc-unix-mode"),
    (["--grpc-address=unix:/run/sluice", "--grpc-unix-mode=1777"], "--grpc-unix-mode"),
    (["--rate-limit=on"], "--rate-limit"),
    (["--rate-limit-resource=R1:1"], "--rate-limit-resource=R1:1 needs --rate-limit=execution_count"),
    *(
        (["--rate-limit=execution_count", f"--rate-limit-resource={entry}"], "expected NAME:COUNT or NAME:COUNT:DEVICE")
        for entry in ("R1", ":1", "R1:", "R1:-1", "R1:1:x", "R1:1:0:0", "R1:9999999999")
    ),
    (["--rate-limit=execution_count", *["--rate-limit-resource=R1:1"] * 2], "was given before"),
    (["--cache-config=redis,host=localhost"], "--cache-config=redis,host=localhost"),
    (["--cache-config=local"], "local,size=BYTES"),
    (["--cache-config=local,size=1G"], "local,size=BYTES"),
    (["--cache-config=local,bytes=1"], "local,size=BYTES"),
    (["--cache-config=local,size=1", "--response-cache-byte-size=1"], "--response-cache-byte-size"),
    (["--response-cache-byte-size=-1"], "--response-cache-byte-size"),
    (["--backend-config=tensorflow,version=2"], "--backend-config=tensorflow,version=2"),
    (["--backend-config=onnxruntime,other=1"], "onnxruntime,other=1"),
    (["--backend-config=onnxruntime,default-max-batch-size=x"], "default-max-batch-size"),
    (["--backend-config=onnxruntime,default-max-batch-size=-1"], "default-max-batch-size"),
    (["--grpc-por=1"], "--grpc-por"),
    (["--no-such-flag=1"], "--no-such-flag"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(
    ("flags", "where", "expected"), FLAGS, ids=lambda value: getattr(value, "__name__", str(value))[:60]
)
def test_each_flag_is_found_in_the_settings(flags, where, expected):
    value: object = parse_serve([REPOSITORY, *flags])
    for name in where.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(("flags", "named"), WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_used_is_named(flags, named):
    with pytest.raises(SettingsError) as caught:
        parse_serve([REPOSITORY, *flags])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["trace key=sesame", "trace=sesame:key=v", "nope:key=sesame", "trace:k y=sesame"])
def test_the_value_of_a_restriction_that_is_wrong_is_not_told(text):
    with pytest.raises(SettingsError) as refused:
        parse_serve([REPOSITORY, f"--grpc-restricted-protocol={text}"])
    assert "sesame" not in str(refused.value)


def test_a_repository_is_needed():
    with pytest.raises(SettingsError, match="--model-repository"):
        parse_serve([])


@pytest.mark.parametrize("flag", REFUSED)
@pytest.mark.parametrize("form", ["{}", "{}=1"])
def test_a_flag_of_triton_that_is_not_there_is_refused_with_the_reason(flag, form):
    with pytest.raises(SettingsError) as caught:
        parse_serve([REPOSITORY, form.format(flag)])
    assert str(caught.value) == f"{flag} is a flag of Triton that is not implemented here: {REFUSED[flag]}"


def test_no_flag_is_both_there_and_refused():
    there = {option for action in actions() for option in action.option_strings}
    assert not there & set(REFUSED)
    assert list(REFUSED) == sorted(REFUSED)


def test_every_flag_is_tried_here_and_explained_in_the_help():
    tried = {flag.partition("=")[0] for flags, *_ in [*FLAGS, *WRONG] for flag in flags}
    assert {"--help", *tried} >= {action.option_strings[-1] for action in actions()} - {"--model-store"}
    assert all(action.help for action in actions())


def test_the_help_ends_well_and_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_serve(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in ("usage: sluice serve", "--model-repository", "8001", "8000", "8002", "--exit-timeout-secs"):
        assert expected in text


def test_settings_do_not_change():
    parsed = parse_serve([REPOSITORY])
    with pytest.raises(AttributeError):
        parsed.server_id = "other"  # type: ignore[misc]


def actions() -> list[argparse.Action]:
    return server_flags.serve_parser()._actions
