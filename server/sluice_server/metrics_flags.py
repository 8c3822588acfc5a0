"""`--metrics-config` as Triton has it (`SETTING=VALUE`, several times), and the other flags of metrics."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sluice_server.flag_values import SettingsError, interval_s, no_gpu_metrics, switch
from sluice_server.observability.latencies import QUANTILES_DEFAULT, LatencyOptions
from sluice_server.observability.metrics import MetricsOptions

if TYPE_CHECKING:
    from collections.abc import Callable

_SWITCHES = ("counter_latencies", "histogram_latencies", "summary_latencies")


def add_metrics_flags(add: Callable[..., object]) -> None:
    """Add the flags to a parser, whose `add_argument` is `add`; the address and the port are others'."""
    add("--metrics-interval-ms", type=interval_s, default=0.0, metavar="MS",
        help="how old what is read of the machine may be (0: it is read at each scrape)")  # fmt: skip
    add("--metrics-config", action="append", default=[], metavar="SETTING=VALUE",
        help="counter_latencies=BOOL (true), histogram_latencies=BOOL (false), summary_latencies=BOOL (false),"
        " summary_quantiles=QUANTILE:ERROR,... of the last minute, within 1%% of their values; several")  # fmt: skip
    add("--allow-cpu-metrics", type=switch, default=True, metavar="true|false",
        help="show what the machine uses (true); what the process uses is always there")  # fmt: skip
    add("--allow-gpu-metrics", type=no_gpu_metrics, default=False, metavar="false", help="there are none (false)")


def metrics_options(args: argparse.Namespace) -> MetricsOptions:
    """What the flags say together; `SettingsError` names the entry that is wrong."""
    values = {"counter_latencies": True, "histogram_latencies": False, "summary_latencies": False}
    quantiles: tuple[float, ...] = ()
    for entry in args.metrics_config:
        key, _, value = entry.partition("=")
        if key in _SWITCHES:
            values[key] = _switch(entry, value)
        elif key == "summary_quantiles":
            quantiles = _quantiles(entry, value)
        else:
            raise SettingsError(
                f"--metrics-config={entry} is not implemented here: there are {', '.join(_SWITCHES)}, summary_quantiles"
            )
    if quantiles and not values["summary_latencies"]:
        raise SettingsError("--metrics-config: summary_quantiles needs summary_latencies=true: there are no summaries")
    kept = LatencyOptions(
        quantiles=(quantiles or QUANTILES_DEFAULT) if values["summary_latencies"] else (),
        histogram=values["histogram_latencies"],
    )
    return MetricsOptions(
        counter_latencies=values["counter_latencies"],
        latencies=kept,
        cpu=args.allow_cpu_metrics,
        interval_ns=round(args.metrics_interval_ms * 1e9),
    )


def _switch(entry: str, value: str) -> bool:
    try:
        return switch(value)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"--metrics-config={entry}: {error}") from None


def _quantiles(entry: str, text: str) -> tuple[float, ...]:
    """The quantiles of pairs with an error that is allowed; the windows' own is smaller than any that makes sense."""
    quantiles = []
    for pair in text.split(","):
        quantile, _, error = pair.partition(":")
        try:
            share, allowed = float(quantile), float(error)
        except ValueError:
            share, allowed = -1.0, -1.0
        if not (0 < share < 1 and 0 <= allowed < 1):
            raise SettingsError(f"--metrics-config={entry}: expected QUANTILE:ERROR,... with shares from 0 to 1")
        quantiles.append(share)
    if len(set(quantiles)) != len(quantiles):
        raise SettingsError(f"--metrics-config={entry}: a quantile stands there twice")
    return tuple(quantiles)
