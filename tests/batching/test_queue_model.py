"""The queue against a naive model, one list that is searched anew for every question, on a virtual clock."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sluice_batching import (
    NO_DEADLINE,
    DeadlineExpired,
    Draining,
    Queue,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
)


class NaiveQueue:
    """What the queue promises, with no thought of cost: `waiting` is in order of arrival."""

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.waiting: list[Request] = []
        self.draining = False

    def refusal(self, request: Request, now_ns: int) -> type | None:
        if self.draining:
            return Draining
        if request.deadline_ns <= now_ns:
            return DeadlineExpired
        for limit, waiting, requested in (
            (self.policy.max_queue_rows, sum(each.rows for each in self.waiting), request.rows),
            (self.policy.max_queue_bytes, sum(each.size_bytes for each in self.waiting), request.size_bytes),
        ):
            if limit and requested > limit:
                return RequestTooLarge
            if limit and waiting + requested > limit:
                return QueueFull
        return None

    def expired(self, now_ns: int) -> list[Request]:
        return sorted(
            (request for request in self.waiting if request.deadline_ns <= now_ns),
            key=lambda request: request.deadline_ns,
        )

    def batch(self, now_ns: int) -> list[Request]:
        alive = [request for request in self.waiting if request.deadline_ns > now_ns]
        if not self.policy.batching:
            return alive[:1]
        for head in alive:
            group = [request for request in alive if request.key == head.key]
            if group[0] is head and (batch := self.due(group, now_ns)):
                return batch
        return []

    def overdue(self, request: Request, now_ns: int) -> bool:
        return 0 < self.policy.max_delay_ns <= now_ns - request.enqueued_ns and not self.draining

    def due(self, group: list[Request], now_ns: int) -> list[Request]:
        """The batch of a group if it is due."""
        sums = [sum(request.rows for request in group[: i + 1]) for i in range(len(group))]
        fitting = [total for total in sums if total <= self.policy.most_merged_rows]
        preferred = [total for total in fitting if total in self.policy.preferred_batch_rows]
        length = len(fitting) or 1  # a request that is larger than what is merged goes alone
        if self.overdue(group[0], now_ns):
            return group[:length]
        if preferred:
            return group[: sums.index(preferred[-1]) + 1]
        enough = max(self.policy.preferred_batch_rows, default=self.policy.most_merged_rows)
        if self.policy.max_delay_ns == 0 or self.draining or len(fitting) < len(group) or fitting[-1] >= enough:
            return group[:length]
        return []

    def returns_something(self, now_ns: int) -> bool:
        return bool(self.expired(now_ns) or self.batch(now_ns))


@st.composite
def policies(draw: st.DrawFn) -> QueuePolicy:
    rows = draw(st.integers(1, 8))
    batching = draw(st.sampled_from([True, True, True, False]))
    merge_rows = draw(st.integers(0, rows))
    return QueuePolicy(
        max_batch_rows=rows,
        merge_rows=merge_rows,
        batching=batching,
        max_delay_ns=draw(st.integers(0, 6)) if batching else 0,
        preferred_batch_rows=tuple(draw(st.lists(st.integers(1, merge_rows or rows), max_size=3))) if batching else (),
        max_queue_rows=draw(st.sampled_from([0, 0, 5, 20])),
        max_queue_bytes=draw(st.sampled_from([0, 0, 7, 40])),
    )


class QueueAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; what comes out must be the same, and every request leaves exactly once."""

    @initialize(policy=policies())
    def start(self, policy: QueuePolicy) -> None:
        self.queue: Queue[Request] = Queue(policy)
        self.model = NaiveQueue(policy)
        self.now_ns = 0
        self.accepted: list[Request] = []
        self.left: list[Request] = []

    def leave(self, requests: list[Request]) -> None:
        for request in requests:
            self.model.waiting.remove(request)
            self.left.append(request)

    @rule(
        rows=st.integers(1, 8),
        size_bytes=st.integers(0, 9),
        key=st.sampled_from("ab"),
        life_ns=st.one_of(st.none(), st.integers(0, 12)),
    )
    def offer(self, rows: int, size_bytes: int, key: str, life_ns: int | None) -> None:
        deadline_ns = NO_DEADLINE if life_ns is None else self.now_ns + life_ns
        request = Request(min(rows, self.model.policy.max_batch_rows), size_bytes, key, deadline_ns)
        expected = self.model.refusal(request, self.now_ns)
        error = self.queue.try_offer(request, self.now_ns)
        assert type(error) is (expected or type(None))
        if error is None:
            assert request.enqueued_ns == self.now_ns
            self.model.waiting.append(request)
            self.accepted.append(request)

    @rule(step_ns=st.integers(1, 5))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule()
    def take(self) -> None:
        expired, batch = self.model.expired(self.now_ns), self.model.batch(self.now_ns)
        assert self.queue.take(self.now_ns) == (batch, expired)
        self.leave(expired)
        self.leave(batch)
        policy = self.model.policy
        assert sum(request.rows for request in batch) <= (
            policy.most_merged_rows if len(batch) > 1 else policy.max_batch_rows
        )
        assert not self.model.policy.batching or len({request.key for request in batch}) <= 1
        assert all(request.deadline_ns > self.now_ns for request in batch)

    @rule()
    def expire(self) -> None:
        expired = self.model.expired(self.now_ns)
        assert self.queue.expire(self.now_ns) == expired
        self.leave(expired)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        waits = request in self.model.waiting
        assert self.queue.cancel(request) is waits
        if waits:
            self.leave([request])

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def drain(self, really: bool) -> None:
        if really:
            self.queue.drain()
            self.model.draining = True

    @invariant()
    def the_counts_are_those_of_what_waits_and_within_the_bounds(self) -> None:
        waiting, policy = self.model.waiting, self.model.policy
        assert len(self.queue) == len(waiting)
        assert self.queue.rows == sum(request.rows for request in waiting)
        assert self.queue.size_bytes == sum(request.size_bytes for request in waiting)
        assert not policy.max_queue_rows or self.queue.rows <= policy.max_queue_rows
        assert not policy.max_queue_bytes or self.queue.size_bytes <= policy.max_queue_bytes

    @invariant()
    def the_wakeup_is_the_first_instant_at_which_a_take_returns_something(self) -> None:
        wakeup_ns = self.queue.next_wakeup_ns()
        if wakeup_ns is None:
            assert not self.model.waiting
        elif wakeup_ns <= self.now_ns:
            assert self.model.returns_something(self.now_ns)
        else:
            assert self.model.returns_something(wakeup_ns)
            assert not self.model.returns_something(wakeup_ns - 1)

    @invariant()
    def the_next_deadline_is_the_earliest_of_what_waits(self) -> None:
        deadlines_ns = [each.deadline_ns for each in self.model.waiting if each.deadline_ns != NO_DEADLINE]
        assert self.queue.next_deadline_ns() == min(deadlines_ns, default=None)

    @invariant()
    def memory_is_bounded_by_what_waits(self) -> None:
        assert len(self.queue._deadlines) <= 2 * len(self.queue) + 64
        assert len(self.queue._groups) <= len(self.queue)
        assert self.queue._ready <= set(self.queue._groups.values())

    def teardown(self) -> None:
        self.queue.drain()
        self.model.draining = True
        while self.queue:
            self.take()
        assert sorted(map(id, self.left)) == sorted(map(id, self.accepted))


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
