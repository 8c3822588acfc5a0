"""What became of a load, as Locust's workers report it and its master writes it into a file of numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sluice_client.load.latencies import NOT_SENT, Generator, Records, quantile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from loadtests.open_loop import OpenLoop


class LoadFailed(Exception):
    """There is no outcome; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one worker sent: arrays [requests] in seconds from the start, FP64, and `codes` and `kinds`, UINT8.

    `started_at_s` is the start in seconds since 1970, `cpu_s` the worker's CPU seconds in the `lasted_s` seconds from
    then on, `lone_s` how long lone requests took before the load (of one worker only), FP64.
    """

    index: int
    started_at_s: float
    cpu_s: float
    lasted_s: float
    most_in_flight: int
    intended_s: npt.NDArray[np.float64]
    sent_s: npt.NDArray[np.float64]
    ended_s: npt.NDArray[np.float64]
    codes: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]
    lone_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, loop: OpenLoop, index: int, started_at_s: float, cpu_s: float, lasted_s: float, lone_s: Any) -> Self:
        """What a loop has sent."""
        sent = loop.log.records()
        arrays = (sent.intended_s, sent.sent_s, sent.ended_s, sent.codes, np.array(loop.kinds), lone_s)
        return cls(index, started_at_s, cpu_s, lasted_s, loop.log.most_in_flight, *arrays)

    def as_message(self) -> dict[str, Any]:
        """As numbers and bytes, which Locust's messages can carry."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value.tobytes() if isinstance(value, np.ndarray) else value for key, value in values.items()}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        """What `as_message` was made of."""
        dtypes = {"codes": np.uint8, "kinds": np.uint8}
        return cls(**{
            key: np.frombuffer(value, dtypes.get(key, np.float64)) if isinstance(value, bytes) else value
            for key, value in message.items()
        })  # fmt: skip

    @property
    def records(self) -> Records:
        """The requests of this worker."""
        return Records.of(self.intended_s, self.sent_s, self.ended_s, self.codes)

    @property
    def generator(self) -> Generator:
        """How this worker did."""
        not_sent = int(np.count_nonzero(self.codes == NOT_SENT))
        return Generator(quantile(self.records.lag_s, 0.99), self.cpu_s / self.lasted_s, self.most_in_flight, not_sent)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A whole load: `kinds` has the index of each request's kind, `generators` one for each worker, `cpu_s` of all."""

    started_at_s: float
    records: Records
    kinds: npt.NDArray[np.uint8]
    lone_s: npt.NDArray[np.float64]
    generators: tuple[Generator, ...]
    cpu_s: float

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Self:
        """What the workers did together."""
        parts = sorted(parts, key=lambda part: part.index)
        intended_s = np.concatenate([part.intended_s for part in parts])
        kinds = np.concatenate([part.kinds for part in parts])[np.argsort(intended_s, kind="stable")]
        return cls(
            parts[0].started_at_s,
            Records.merged([Records(part.intended_s, part.sent_s, part.ended_s, part.codes) for part in parts]),
            kinds,
            np.concatenate([part.lone_s for part in parts]),
            tuple(part.generator for part in parts),
            sum(part.cpu_s for part in parts),
        )

    def of_kind(self, kind: int) -> Records:
        """The requests of one kind."""
        mine, all_ = self.kinds == kind, self.records
        return Records(all_.intended_s[mine], all_.sent_s[mine], all_.ended_s[mine], all_.codes[mine])


def write_outcome(path: Path, parts: Sequence[Part]) -> None:
    """Write what all workers reported."""
    arrays = {
        f"{number}.{key}": np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.array(value)
        for number, part in enumerate(parts)
        for key, value in part.as_message().items()
    }
    with path.open("wb") as file:
        np.savez(file, workers=np.array(len(parts)), **arrays)


def write_problem(path: Path, text: str) -> None:
    """Write why there is no outcome."""
    with path.open("wb") as file:
        np.savez(file, problem=np.array(text))


def read_outcome(path: Path) -> Outcome:
    """What was written. LoadFailed for a problem."""
    with np.load(path) as file:
        if "problem" in file:
            raise LoadFailed(str(file["problem"]))
        messages: list[dict[str, Any]] = [{} for _ in range(int(file["workers"]))]
        for name in file.files:
            number, _, key = name.partition(".")
            if key:
                value = file[name]
                messages[int(number)][key] = value.tobytes() if value.ndim else value.item()
    return Outcome.of([Part.from_message(message) for message in messages])
