"""What a load test reports: the table on the terminal, the JSON result, and one HTML file with everything in it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from loadtests.markdown import markdown, plain
from loadtests.plots import draw_all, to_svg
from loadtests.slo import Value, Verdict, judge
from sluice_client.load.latencies import Quantiles
from sluice_client.load.tables import json_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loadtests.measuring import Run
    from loadtests.scenario import Scenario
    from sluice_client.load.latencies import Records

    Rows = list[tuple[str, ...]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e6ea; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
td.pass { color: #1a7f37 } td.fail, p.fail { color: #b3261e; font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 1rem 2rem }
.plots h2 { margin: 1rem 0 .3rem } .plots svg { width: 100%; height: auto }
.about { color: #565c66; margin-top: .2rem }
"""

PASS, FAIL = "pass", "FAIL"


def passed(verdicts: Sequence[Verdict], runs: Sequence[Run]) -> bool:
    """Whether all objectives are kept, and the load was what was asked for on every way."""
    return all(verdict.passed for verdict in verdicts) and not problems(runs)


def problems(runs: Sequence[Run]) -> list[str]:
    """Why the load was not what was asked for, on each way."""
    return [f"{run.way}: {problem}" for run in runs for problem in run.problems]


def objective_rows(verdicts: Sequence[Verdict], runs: Sequence[Run]) -> Rows:
    """A line for each objective, which the last run is held to; the other ways stand next to it."""
    others = runs[:-1]
    measured = ["measured", *(each.way for each in others)] if others else ["measured"]
    rows: Rows = [("objective", "limit", *measured, "")]
    for verdict in verdicts:
        kind, limit = verdict.objective.kind, verdict.objective.limit
        values = [verdict.value, *(kind.value(each.measured) for each in others)]
        sign = "at least" if kind.at_least else "at most"
        rows.append((kind.title, f"{sign} {limit:g}", *map(plain, values), PASS if verdict.passed else FAIL))
    kept_up = ("no" if run.problems else "yes" for run in (runs[-1], *others))
    rows.append(("the generator kept up", "", *kept_up, FAIL if problems(runs) else PASS))
    return rows


def way_rows(runs: Sequence[Run]) -> Rows:
    """What the second way to the server adds to the first: response time by quantile, and CPU per request."""
    first, second = (Quantiles.of(run.outcome.records.response_s) for run in runs)
    rows: Rows = [("measured", runs[0].way, runs[1].way, "added")]
    names = ("p50", "p95", "p99", "p99.9", "max")
    for name, one, other in zip(names, _values(first), _values(second), strict=True):
        rows.append(_compared(f"response time {name}, ms", one * 1e3, other * 1e3))
    server_us = (run.measured.server_cpu_us_per_request for run in runs)
    envoy_us = plain(runs[1].measured.envoy_cpu_us_per_request)
    rows.append(_compared("server CPU per request, us", *server_us))
    rows.append(("Envoy's CPU per request, us", plain(None), envoy_us, envoy_us))
    return rows


def _compared(what: str, one: Value, other: Value) -> tuple[str, ...]:
    return what, plain(one), plain(other), plain(None if one is None or other is None else other - one)


def kind_rows(scenario: Scenario, run: Run) -> Rows:
    """A line for each kind of request."""
    rows: Rows = [("requests", "number", "not OK", "p50 ms", "p95 ms", "p99 ms", "service p50 ms", "service p99 ms")]
    named = [(kind.title, run.outcome.of_kind(number)) for number, kind in enumerate(scenario.requests)]
    for title, records in [*named, ("all", run.outcome.records)]:
        response, service = Quantiles.of(records.response_s), Quantiles.of(records.service_s)
        times = (response.p50_s, response.p95_s, response.p99_s, service.p50_s, service.p99_s)
        failed = len(records) - len(records.response_s)
        rows.append((title, f"{len(records):,}", f"{failed:,}", *(plain(time * 1e3) for time in times)))
    return rows


def generator_rows(run: Run) -> Rows:
    """A line for each worker process of the generator."""
    rows: Rows = [("worker", "sent late, p99, ms", "cores", "in flight at most", "not sent")]
    for number, each in enumerate(run.outcome.generators, 1):
        cells = (plain(each.lag_p99_s * 1e3), plain(each.cpu_share), str(each.most_in_flight), str(each.not_sent))
        rows.append((str(number), *cells))
    return rows


def render_text(scenario: Scenario, runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    """What the terminal shows."""
    parts = [f"{scenario.name}: {scenario.title}", markdown(objective_rows(verdicts, runs), words=1)]
    parts += [markdown(way_rows(runs), words=1)] if len(runs) > 1 else []
    parts += [markdown(kind_rows(scenario, runs[-1]), words=1)]
    parts += [f"{FAIL}: {problem}" for problem in problems(runs)]
    return "\n\n".join(parts)


def as_json(scenario: Scenario, runs: Sequence[Run], facts: Mapping[str, str]) -> dict[str, Any]:
    """Everything that was measured, with the objectives; what was not is null."""
    verdicts = judge(scenario.objectives, runs[-1].measured)
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "passed": passed(verdicts, runs),
        "held_to_objectives": runs[-1].way,
        "objectives": [
            {
                "key": verdict.objective.kind.key,
                "limit": verdict.objective.limit,
                "at_least": verdict.objective.kind.at_least,
                "value": verdict.value,
                "passed": verdict.passed,
            }
            for verdict in verdicts
        ],
        "runs": [_run_as_json(scenario, run) for run in runs],
        "machine": dict(facts),
    }


def _run_as_json(scenario: Scenario, run: Run) -> dict[str, Any]:
    records = run.outcome.records
    named = {kind.title: run.outcome.of_kind(number) for number, kind in enumerate(scenario.requests)}
    return {
        "way": run.way,
        "problems": list(run.problems),
        "requests": len(records),
        "outcomes": dict(records.outcomes),
        "measured": {name: getattr(run.measured, name) for name in run.measured.__slots__},
        **_times_as_json(records),
        "kinds": {title: {"requests": len(each), **_times_as_json(each)} for title, each in named.items()},
        "generators": [
            {
                "lag_p99_ms": json_number(each.lag_p99_s * 1e3),
                "cpu_cores": each.cpu_share,
                "most_in_flight": each.most_in_flight,
                "not_sent": each.not_sent,
            }
            for each in run.outcome.generators
        ],
    }


def _times_as_json(records: Records) -> dict[str, Any]:
    names = ("p50", "p95", "p99", "p999", "max")
    found = {}
    times = {"response_ms": records.response_s, "service_ms": records.service_s, "lag_ms": records.lag_s}
    for what, values in times.items():
        quantiles = _values(Quantiles.of(values))
        found[what] = {name: json_number(value * 1e3) for name, value in zip(names, quantiles, strict=True)}
    return found


def _values(quantiles: Quantiles) -> tuple[float, ...]:
    return quantiles.p50_s, quantiles.p95_s, quantiles.p99_s, quantiles.p999_s, quantiles.max_s


def render_html(scenario: Scenario, runs: Sequence[Run], facts: Mapping[str, str]) -> str:
    """One file that needs no other."""
    verdicts = judge(scenario.objectives, runs[-1].measured)
    name, title = html.escape(scenario.name), html.escape(scenario.title)
    result = PASS if passed(verdicts, runs) else FAIL
    about = f"{len(runs[-1].outcome.records):,} requests in {scenario.duration_s:g} s, arrivals: {scenario.arrivals}"
    ways = ", then ".join(run.way for run in runs)
    parts = [
        f"<h1>{title}</h1><p class=about>{name}: {about}; {html.escape(ways)}</p>",
        f'<p class="{result.lower()}">{result}</p>',
        *(f"<p class=fail>{html.escape(problem)}</p>" for problem in problems(runs)),
        _section("Objectives", objective_rows(verdicts, runs)),
        _section("What the sidecar adds", way_rows(runs)) if len(runs) > 1 else "",
        '<div class="plots">',
        *(f"<section><h2>{title}</h2>{to_svg(figure)}</section>" for title, figure in draw_all(scenario, runs).items()),
        "</div>",
        *(_section(f"Requests, {run.way}", kind_rows(scenario, run)) for run in runs),
        *(_section(f"The generator, {run.way}", generator_rows(run)) for run in runs),
        _section("Machine", [("", ""), *facts.items()]),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}: {result}</title><style>{STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _section(title: str, rows: Rows) -> str:
    return f"<h2>{html.escape(title)}</h2>{_table(rows)}"


def _table(rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = f' class="{text.lower()}"' if text in {PASS, FAIL} else ""
    return f"<td{kind}>{html.escape(text)}</td>"
