"""The settings of one queue: what a batch may be, how long it may wait to grow, and how much may wait."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """How requests become batches; valid once built (ValueError names the field that is not).

    batching: False makes every request its own batch, in order of arrival, whatever its key.
    max_batch_rows: the most rows of a batch, and so of a request.
    merge_rows: the most rows that requests are merged to, a larger one runs alone; 0 = max_batch_rows.
    max_delay_ns: how long the oldest request of an incomplete batch waits for others, counted from its enqueueing.
    preferred_batch_rows: sizes at which a batch goes without waiting for the delay.
    max_queue_rows, max_queue_bytes: the most that may wait; 0 = unbounded.
    """

    max_batch_rows: int = 1
    merge_rows: int = 0
    batching: bool = False
    max_delay_ns: int = 0
    preferred_batch_rows: tuple[int, ...] = ()
    max_queue_rows: int = 0
    max_queue_bytes: int = 0

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
