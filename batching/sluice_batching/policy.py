"""The settings of one queue: what a batch may be, how long it waits to grow, what goes first, and how much may wait."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelPolicy:
    """How the requests of one priority wait; valid once built (ValueError names the field that is not).

    max_requests: the most that may wait; 0 = unbounded.
    timeout_ns: how long a request may wait, counted from its enqueueing; 0 = for ever.
    delays: what becomes of a request that has waited so long: False, it expires; True, it goes behind all others of its
        priority, and is served all the same.
    allow_timeout_override: a request's own `timeout_ns` counts, where it is shorter.
    """

    max_requests: int = 0
    timeout_ns: int = 0
    delays: bool = False
    allow_timeout_override: bool = False

    def __post_init__(self) -> None:
        for name in ("max_requests", "timeout_ns"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    def timeout_of(self, asked_ns: int) -> int:
        """How long a request may wait that asks for this timeout; 0 for both: for none."""
        if asked_ns and self.allow_timeout_override:
            return min(asked_ns, self.timeout_ns or asked_ns)
        return self.timeout_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """Priority levels, 1 the first to be served, and the policy of each; valid once built (ValueError).

    levels: how many there are; 0 = priorities have no meaning, and `default_policy` is that of all requests.
    default_level: that of requests whose priority is none of the levels.
    policies: of levels that differ from `default_policy`.
    """

    levels: int = 0
    default_level: int = 0
    default_policy: LevelPolicy = LevelPolicy()
    policies: Mapping[int, LevelPolicy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.levels < 0:
            raise ValueError(f"levels must not be negative, got {self.levels}")
        if self.levels and not 1 <= self.default_level <= self.levels:
            raise ValueError(f"default_level must lie in 1..{self.levels}, got {self.default_level}")
        if not self.levels and self.default_level:
            raise ValueError(f"default_level must be 0 without levels, got {self.default_level}")
        for level in self.policies:
            if not 1 <= level <= self.levels:
                raise ValueError(f"policies must be of levels 1..{self.levels}, got one of {level}")

    def level_of(self, priority: int) -> int:
        """The level of a request that asks for this priority."""
        return priority if 1 <= priority <= self.levels else self.default_level

    def policy_of(self, level: int) -> LevelPolicy:
        """The policy of a level."""
        return self.policies.get(level, self.default_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """How requests become batches; valid once built (ValueError names the field that is not).

    batching: False makes every request its own batch, in order, whatever its key.
    max_batch_rows: the most rows of a request, and so of a batch.
    merge_rows: up to how many rows requests are merged, where larger batches do not pay; 0 = `max_batch_rows`.
    max_delay_ns: how long the oldest request of an incomplete batch waits for others, counted from its enqueueing.
    preferred_batch_rows: sizes at which a batch goes without waiting for the delay.
    max_queue_rows, max_queue_bytes: the most that may wait; 0 = unbounded.
    deadline_first: False keeps requests of one priority in order of arrival, whatever their deadlines.
    priorities: levels of priority, and how long requests of each may wait; None = there are none.
    """

    max_batch_rows: int = 1
    merge_rows: int = 0
    batching: bool = False
    max_delay_ns: int = 0
    preferred_batch_rows: tuple[int, ...] = ()
    max_queue_rows: int = 0
    max_queue_bytes: int = 0
    deadline_first: bool = True
    priorities: Priorities | None = None

    def __post_init__(self) -> None:
        if self.max_batch_rows < 1:
            raise ValueError(f"max_batch_rows must be at least 1, got {self.max_batch_rows}")
        if not 0 <= self.merge_rows <= self.max_batch_rows:
            raise ValueError(f"merge_rows must lie in 0..{self.max_batch_rows}, got {self.merge_rows}")
        for name in ("max_delay_ns", "max_queue_rows", "max_queue_bytes"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for rows in self.preferred_batch_rows:
            if not 1 <= rows <= self.most_merged_rows:
                raise ValueError(f"preferred_batch_rows must lie in 1..{self.most_merged_rows}, got {rows}")
        if not self.batching and (self.max_delay_ns or self.preferred_batch_rows):
            raise ValueError("max_delay_ns and preferred_batch_rows have a meaning only with batching")

    @property
    def most_merged_rows(self) -> int:
        """The most rows of a batch of several requests."""
        return self.merge_rows or self.max_batch_rows
