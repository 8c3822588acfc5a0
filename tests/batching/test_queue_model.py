"""The queue against a naive model, one list that is searched anew for every question, on a virtual clock."""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sluice_batching import (
    NO_DEADLINE,
    DeadlineExpired,
    Draining,
    LevelPolicy,
    Priorities,
    PriorityQueue,
    Queue,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
)
from sluice_batching.queue import HORIZON_NS


class Asking(Request):
    """A request that asks for a priority and a timeout."""

    __slots__ = ("priority", "timeout_ns")

    def __init__(self, rows: int, size_bytes: int, key: str, deadline_ns: int, priority: int, timeout_ns: int) -> None:
        super().__init__(rows, size_bytes, key, deadline_ns)
        self.priority = priority
        self.timeout_ns = timeout_ns


class NaiveQueue:
    """What the queue promises, with no thought of cost: `waiting` is in order of arrival.

    `due_ns` and `delays_at_ns` are by request; the latter are of those that are yet to be delayed.
    """

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.merge_rows = policy.merge_rows or policy.max_batch_rows
        self.tuned_rows = 0
        self.waiting: list[Asking] = []
        self.due_ns: dict[Asking, int] = {}
        self.delays_at_ns: dict[Asking, int] = {}
        self.delayed: set[Asking] = set()
        self.draining = False

    def level(self, request: Asking) -> int:
        return self.policy.priorities.level_of(request.priority) if self.policy.priorities else 0

    def level_policy(self, request: Asking) -> LevelPolicy:
        return self.policy.priorities.policy_of(self.level(request)) if self.policy.priorities else LevelPolicy()

    def enter(self, request: Asking, now_ns: int) -> None:
        self.waiting.append(request)
        self.due_ns[request] = now_ns
        if self.policy.deadline_first:
            self.due_ns[request] = min(request.deadline_ns, now_ns + HORIZON_NS)

    def accept(self, request: Asking, now_ns: int) -> None:
        self.enter(request, now_ns)
        policy = self.level_policy(request)
        timeout_ns = policy.timeout_of(request.timeout_ns)
        if timeout_ns and policy.delays:
            self.delays_at_ns[request] = now_ns + timeout_ns

    def delay(self, now_ns: int) -> None:
        """Put behind the others what is to be by now."""
        order = {request: place for place, request in enumerate(self.waiting)}
        for request in sorted(self.delays_at_ns, key=lambda each: (self.delays_at_ns[each], order.get(each, 0))):
            if self.delays_at_ns[request] > now_ns:
                continue
            del self.delays_at_ns[request]
            if request in self.waiting and request.deadline_ns > now_ns and not self.draining:
                self.waiting.remove(request)
                self.delayed.add(request)
                self.enter(request, now_ns)

    def in_order(self, requests: Iterable[Asking]) -> list[Asking]:
        return sorted(requests, key=lambda each: (self.level(each), each in self.delayed, self.due_ns[each]))

    def refusal(self, request: Asking, now_ns: int) -> type | None:
        if self.draining:
            return Draining
        most = self.level_policy(request).max_requests
        if most and sum(self.level(each) == self.level(request) for each in self.waiting) >= most:
            return QueueFull
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
        rows = sum(each.rows for each in self.waiting)
        return QueueFull if rows and self.tuned_rows and rows + request.rows > self.tuned_rows else None

    def expired(self, now_ns: int) -> list[Asking]:
        return sorted(
            (request for request in self.waiting if request.deadline_ns <= now_ns),
            key=lambda request: request.deadline_ns,
        )

    def batch(self, now_ns: int) -> list[Asking]:
        alive = self.in_order(request for request in self.waiting if request.deadline_ns > now_ns)
        if not self.policy.batching:
            return alive[:1]
        for head in alive:
            group = [request for request in alive if request.key == head.key]
            if group[0] is head and (batch := self.due(group, now_ns)):
                return batch
        return []

    def overdue(self, group: list[Asking], now_ns: int) -> bool:
        oldest = min(group, key=self.waiting.index)
        return 0 < self.policy.max_delay_ns <= now_ns - oldest.enqueued_ns and not self.draining

    def due(self, group: list[Asking], now_ns: int) -> list[Asking]:
        """The batch of a group if it is due."""
        sums = [sum(request.rows for request in group[: i + 1]) for i in range(len(group))]
        fitting = [total for total in sums if total <= self.merge_rows] or sums[:1]
        preferred = [total for total in fitting if total in self.policy.preferred_batch_rows]
        if self.overdue(group, now_ns):
            return group[: len(fitting)]
        if preferred:
            return group[: sums.index(preferred[-1]) + 1]
        enough = min(max(self.policy.preferred_batch_rows, default=self.merge_rows), self.merge_rows)
        if self.policy.max_delay_ns == 0 or self.draining or len(fitting) < len(group) or fitting[-1] >= enough:
            return group[: len(fitting)]
        return []

    def returns_something(self, now_ns: int) -> bool:
        return bool(self.expired(now_ns) or self.batch(now_ns))


@st.composite
def level_policies(draw: st.DrawFn) -> LevelPolicy:
    return LevelPolicy(
        max_requests=draw(st.sampled_from([0, 0, 2])),
        timeout_ns=draw(st.sampled_from([0, 1, 4, 9])),
        delays=draw(st.booleans()),
        allow_timeout_override=draw(st.booleans()),
    )


@st.composite
def priorities(draw: st.DrawFn) -> Priorities:
    levels = draw(st.integers(0, 3))
    of_levels = st.dictionaries(st.integers(1, levels), level_policies()) if levels else st.just({})
    return Priorities(
        levels=levels,
        default_level=draw(st.integers(1, levels)) if levels else 0,
        default_policy=draw(level_policies()),
        policies=draw(of_levels),
    )


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
        deadline_first=draw(st.sampled_from([True, True, True, False])),
        priorities=draw(st.one_of(st.none(), priorities())),
    )


class QueueAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; what comes out must be the same, and every request leaves exactly once."""

    @initialize(policy=policies())
    def start(self, policy: QueuePolicy) -> None:
        make_queue: type[Queue[Asking]] = PriorityQueue if policy.priorities else Queue
        self.queue = make_queue(policy)
        self.model = NaiveQueue(policy)
        self.now_ns = 0
        self.accepted: list[Asking] = []
        self.left: list[Asking] = []

    def leave(self, requests: list[Asking]) -> None:
        for request in requests:
            self.model.waiting.remove(request)
            self.left.append(request)

    @rule(
        rows=st.integers(1, 8),
        size_bytes=st.integers(0, 9),
        key=st.sampled_from("ab"),
        life_ns=st.one_of(st.none(), st.integers(0, 12), st.integers(HORIZON_NS - 4, HORIZON_NS + 4)),
        priority=st.integers(0, 4),
        timeout_ns=st.sampled_from([0, 0, 1, 3, 20]),
    )
    def offer(self, rows: int, size_bytes: int, key: str, life_ns: int | None, priority: int, timeout_ns: int) -> None:
        deadline_ns = NO_DEADLINE if life_ns is None else self.now_ns + life_ns
        rows = min(rows, self.model.policy.max_batch_rows)
        request = Asking(rows, size_bytes, key, deadline_ns, priority, timeout_ns)
        expected = self.model.refusal(request, self.now_ns)
        error = self.queue.try_offer(request, self.now_ns)
        assert type(error) is (expected or type(None))
        if error is None:
            assert request.enqueued_ns == self.now_ns
            self.model.accept(request, self.now_ns)
            self.accepted.append(request)

    @rule(merge_rows=st.integers(1, 9), queue_rows=st.integers(1, 20))
    def tune(self, merge_rows: int, queue_rows: int) -> None:
        self.queue.tune(merge_rows, queue_rows)
        self.model.merge_rows = min(merge_rows, self.model.policy.most_merged_rows)
        self.model.tuned_rows = queue_rows

    @rule(
        kinds=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 9), st.sampled_from("ab")), min_size=1, max_size=4),
        lives_ns=st.lists(st.integers(0, 12), max_size=4),
    )
    def offer_together(self, kinds: list[tuple[int, int, str]], lives_ns: list[int]) -> None:
        if self.model.policy.priorities:
            return  # nobody offers so to a queue with priorities
        limit = self.model.policy.max_batch_rows
        requests = [Asking(min(rows, limit), size_bytes, key, NO_DEADLINE, 0, 0) for rows, size_bytes, key in kinds]
        for request, life_ns in zip(requests, lives_ns, strict=False):
            request.deadline_ns = self.now_ns + life_ns
        rows, size_bytes = sum(each.rows for each in requests), sum(each.size_bytes for each in requests)
        all_of_them = Asking(rows, size_bytes, "", min(each.deadline_ns for each in requests), 0, 0)
        expected = self.model.refusal(all_of_them, self.now_ns)
        error = self.queue.try_offer_together(requests, self.now_ns)
        assert type(error) is (expected or type(None))
        if error is None:
            for request in requests:
                self.model.accept(request, self.now_ns)
            self.accepted += requests

    @rule(step_ns=st.integers(1, 5))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule()
    def take(self) -> None:
        self.model.delay(self.now_ns)
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
        self.model.delay(self.now_ns)
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
        elif any(instant_ns <= max(wakeup_ns, self.now_ns) for instant_ns in self.model.delays_at_ns.values()):
            # Somebody is to be delayed by then, which may or may not make anything due.
            assert wakeup_ns <= self.now_ns or not self.model.returns_something(wakeup_ns - 1)
        elif wakeup_ns <= self.now_ns:
            assert self.model.returns_something(self.now_ns)
        else:
            assert self.model.returns_something(wakeup_ns)
            assert not self.model.returns_something(wakeup_ns - 1)

    @invariant()
    def the_next_deadline_is_the_earliest_of_what_waits(self) -> None:
        waiting = self.model.waiting
        instants_ns = [each.deadline_ns for each in waiting if each.deadline_ns != NO_DEADLINE]
        instants_ns += [instant_ns for each, instant_ns in self.model.delays_at_ns.items() if each in waiting]
        assert self.queue.next_deadline_ns() == min(instants_ns, default=None)

    @invariant()
    def memory_is_bounded_by_what_waits(self) -> None:
        assert len(self.queue._deadlines) <= 2 * len(self.queue) + 64
        assert len(self.queue._groups) <= len(self.queue)
        assert self.queue._ready <= set(self.queue._groups.values())
        assert len(self.queue._overtaking) <= len(self.queue)
        assert sum(len(group.overtaking) for group in self.queue._groups.values()) == len(self.queue._overtaking)

    def teardown(self) -> None:
        self.queue.drain()
        self.model.draining = True
        while self.queue:
            self.take()
        assert sorted(map(id, self.left)) == sorted(map(id, self.accepted))


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)
