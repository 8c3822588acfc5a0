"""Scenario files and model repositories for the tests of load tests, and outcomes that were never measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loadtests.outcome import Outcome
from loadtests.server_watch import Sample, Series
from sluice_client.load.latencies import Generator, Records, quantile
from support import models

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SERVER = '[server]\nrepository = "models"\n'
ARRIVALS = '[arrivals]\nprocess = "constant"\nper_s = 50\n'
REQUEST = '[[requests]]\nmodel = "double"\n'
SLO = "[slo]\nerror_ratio = 0\n"
TOP = 'title = "A test"\nduration_s = 2\n'


def write_repository(folder: Path, *, iterations: int = 0) -> Path:
    """A repository with one model, `double`, in folder/models: fast, or in a loop of as many iterations per request."""
    repository = folder / "models"
    rows = np.arange(24, dtype=np.float32).reshape(-1, 1)
    model, answer = (models.slow(iterations), rows) if iterations else (models.affine(2.0, 0.0, ("N", 1)), 2 * rows)
    directory = models.write_model(repository, "double", model, max_batch_size=0 if iterations else 16)
    np.savez(directory / "golden.npz", X=rows, Y=answer)
    return repository


def write_scenario(folder: Path, *parts: str, name: str = "test") -> Path:
    """A scenario of these parts, and of the constants above for the tables that none of them begins."""
    text = "\n".join(parts)
    whole = [TOP if "title =" not in text else ""]
    whole += [part for part in (SERVER, ARRIVALS, REQUEST, SLO) if part.partition("\n")[0] not in text]
    path = folder / f"{name}.toml"
    path.write_text("\n".join([whole[0], *parts, *whole[1:]]).lstrip("\n"))
    return path


def outcome(
    intended_s: Sequence[float],
    lag_s: Sequence[float],
    service_s: Sequence[float],
    codes: Sequence[int],
    *,
    kinds: Sequence[int] | None = None,
    cpu_share: float = 0.2,
    lone_s: Sequence[float] = (0.002,),
) -> Outcome:
    """An outcome of one worker that took a second for each request; lags and service times are told by request."""
    intended, lag = np.array(intended_s), np.array(lag_s)
    records = Records.of(intended, intended + lag, intended + lag + np.array(service_s), codes)
    not_sent = int(np.count_nonzero(records.codes == 255))
    lag_p99_s = quantile(lag, 0.99)
    generator = Generator(lag_p99_s, cpu_share, len(intended), not_sent)
    of_kind = np.array(kinds if kinds is not None else [0] * len(intended), np.uint8)
    return Outcome(1_000.0, records, of_kind, np.array(lone_s), (generator,), cpu_share * len(intended))


def series(cpu_s: Sequence[float], rss_mib: Sequence[float], started_at_s: float = 1_000.0) -> Series:
    """A look at a server each second from the start on; a row more each, a batch every second look."""
    samples = [
        Sample(started_at_s + number, cpu, rss * 2**20, float(number), float(number // 2), 1.0)
        for number, (cpu, rss) in enumerate(zip(cpu_s, rss_mib, strict=True))
    ]
    return Series.of(samples, started_at_s)
