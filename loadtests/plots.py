"""The plots of a load test's report, each as SVG that needs nothing else."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from loadtests.measuring import end_s
from sluice_client.load.latencies import NOT_SENT, OK, quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from loadtests.measuring import Run
    from loadtests.scenario import Scenario
    from sluice_client.load.latencies import Records

    Floats = npt.NDArray[np.float64]

SIZE_INCHES: Final = (7.6, 3.6)
COLOURS: Final = ("#1f6f8b", "#d1603d")
"""By way to the server; they differ in lightness too."""
GREY: Final = "#8a8f98"
BAD: Final = "#b3261e"

POINTS: Final = 60
"""Windows of a plot over time: narrower ones hold too few requests to have a p99."""

WINDOW_MIN_S: Final = 0.25
QUANTILES: Final = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
OBJECTIVE_SHARES: Final = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99, "p999_ms": 0.999}

STYLE: Final = {
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "sluice",  # the same plot is the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw_all(scenario: Scenario, runs: Sequence[Run]) -> dict[str, Figure]:
    """Every plot by its title; those of what was not measured are left out."""
    with mpl.rc_context(STYLE):
        figures = {
            "Latency over time": _latency_over_time(scenario, runs),
            "Latency by percentile": _by_percentile(scenario, runs),
            "Throughput": _throughput(scenario, runs),
            "Rows per batch": _series(scenario, runs, "mean rows per batch", _rows_per_batch),
            "Queue depth": _series(scenario, runs, "requests that wait", lambda run: run.series.pending, floor=1.0),
            "Server CPU": _series(scenario, runs, "cores", _cores),
            "Server memory": _series(scenario, runs, "RSS, MiB", lambda run: run.series.rss_bytes / 2**20),
        }
    return {title: figure for title, figure in figures.items() if figure is not None}


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def window_edges(duration_s: float) -> Floats:
    """Where the windows of a plot over time begin and end, all equally wide."""
    number = max(1, min(POINTS, math.floor(duration_s / WINDOW_MIN_S)))
    return np.linspace(0.0, duration_s, number + 1)


def _figure(label: str, unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    return figure, axes


def _name(runs: Sequence[Run], run: Run, what: str) -> str:
    return what if len(runs) == 1 else f"{what}, {run.way}"


def _legend(axes: Any, columns: int) -> None:
    """Above the plot, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.6, fontsize=8.5
    )


def _latency_over_time(scenario: Scenario, runs: Sequence[Run]) -> Figure:
    figure, axes = _figure("seconds from the start, by when requests were due", "response time, ms")
    edges = window_edges(scenario.duration_s)
    middles = (edges[1:] + edges[:-1]) / 2
    for run, colour in zip(runs, COLOURS, strict=False):
        windows = list(run.outcome.records.windows(0.0, edges[1], len(middles)))
        for share, style in ((0.99, "-"), (0.5, ":")):
            values = [quantile(window.response_s, share) * 1e3 for window in windows]
            axes.plot(middles, values, style, color=colour, label=_name(runs, run, f"p{share * 100:g}"))
    _mark_limit(scenario, axes, "p99_ms")
    axes.set_xlim(0.0, scenario.duration_s)
    axes.set_ylim(bottom=0.0)
    _legend(axes, 3)
    return figure


def _mark_limit(scenario: Scenario, axes: Any, key: str) -> None:
    """A line at an objective, where it is near enough not to flatten what was measured."""
    for objective in scenario.objectives:
        limit = objective.limit
        if objective.kind.key == key and limit < 3 * axes.get_ylim()[1]:
            axes.axhline(limit, color=BAD, linestyle="--", linewidth=1.0, label=f"objective {key}")


def _by_percentile(scenario: Scenario, runs: Sequence[Run]) -> Figure:
    """As HDR histograms are plotted: percentiles on the scale of 1 / (1 - share), where each nine is as wide."""
    figure, axes = _figure("percentile (response time from when it was due, service time from when it was sent)", "ms")
    most = 2.0
    for run, colour in zip(runs, COLOURS, strict=False):
        records = run.outcome.records
        for values_s, style, what in (
            (records.response_s, "-", "response time"),
            (records.service_s, ":", "service time"),
        ):
            ordered_ms = np.sort(values_s) * 1e3
            # The last one stands for all that is beyond it, and has no place on this scale.
            below = np.arange(len(ordered_ms) - 1) / max(len(ordered_ms), 1)
            axes.plot(1 / (1 - below), ordered_ms[:-1], style, color=colour, label=_name(runs, run, what))
            most = max(most, float(len(ordered_ms)))
    limits = [each for each in scenario.objectives if each.kind.key in OBJECTIVE_SHARES]
    if limits:
        places = [1 / (1 - OBJECTIVE_SHARES[each.kind.key]) for each in limits]
        heights = [each.limit for each in limits]
        axes.plot(places, heights, linestyle="none", marker="v", color=BAD, label="objectives")
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [share for share in QUANTILES if 1 / (1 - share) <= most]
    axes.set_xticks([1 / (1 - share) for share in shown], labels=[f"{share * 100:.7g}" for share in shown])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(1.0, most)
    _legend(axes, 3)
    return figure


def _throughput(scenario: Scenario, runs: Sequence[Run]) -> Figure:
    figure, axes = _figure("seconds from the start", "requests per second")
    edges = window_edges(max(end_s(scenario, run.outcome) for run in runs))
    due = _per_s(runs[0].outcome.records.intended_s, edges)
    axes.stairs(due, edges, color=GREY, fill=True, alpha=0.3, label="due")
    for run, colour in zip(runs, COLOURS, strict=False):
        records = run.outcome.records
        answered = _per_s(records.ended_s[records.codes == OK], edges)
        axes.stairs(answered, edges, baseline=None, color=colour, label=_name(runs, run, "answered OK"))
        if failed := _failed(records):
            rates = _per_s(failed, edges)
            axes.stairs(rates, edges, baseline=None, color=colour, linestyle=":", label=_name(runs, run, "failed"))
    axes.set_xlim(0.0, edges[-1])
    axes.set_ylim(bottom=0.0)
    _legend(axes, 3)
    return figure


def _failed(records: Records) -> list[float]:
    """When requests failed; those that were not sent, when they were due."""
    ended = np.where(records.codes == NOT_SENT, records.intended_s, records.ended_s)
    failed: list[float] = ended[records.codes != OK].tolist()
    return failed


def _per_s(times_s: Floats | list[float], edges: Floats) -> Floats:
    counts, _ = np.histogram(times_s, edges)
    rates: Floats = counts / np.diff(edges)
    return rates


def _rows_per_batch(run: Run) -> Floats:
    return _slopes(run.series.rows, run.series.batches)


def _cores(run: Run) -> Floats:
    return _slopes(run.series.cpu_s, run.series.at_s)


def _slopes(over: Floats, under: Floats) -> Floats:
    """How much one series grew per growth of another, from each sample to the next; NaN where the other stood still."""
    grown = np.diff(under)
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes: Floats = np.where(grown > 0, np.diff(over) / grown, np.nan)
    return np.concatenate([slopes[:1], slopes])


def _series(
    scenario: Scenario, runs: Sequence[Run], unit: str, value: Callable[[Run], Floats], *, floor: float = 0.0
) -> Figure | None:
    """A series of the server's over time; None where nothing was seen."""
    figure, axes = _figure("seconds from the start", unit)
    drawn = False
    for run, colour in zip(runs, COLOURS, strict=False):
        values = value(run)
        if not np.isnan(values).all():
            axes.plot(run.series.at_s, values, color=colour, label=run.way)
            drawn = True
    if not drawn:
        return None
    axes.set_xlim(0.0, max(end_s(scenario, run.outcome) for run in runs))
    axes.set_ylim(0.0, max(axes.get_ylim()[1], floor))
    if len(runs) > 1:
        _legend(axes, 2)
    return figure
