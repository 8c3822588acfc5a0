"""The sequencer against a naive model, lists that are searched anew for every question, on a virtual clock."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sluice_batching import (
    NO_DEADLINE,
    DeadlineExpired,
    Draining,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
    SequenceNotStarted,
    SequencePolicy,
    Sequencer,
    Step,
)


class NaiveSequence:
    """One sequence: what waits in order, what is under way, since when it has been idle."""

    def __init__(self, sequence_id: int) -> None:
        self.sequence_id = sequence_id
        self.waiting: list[Request] = []
        self.running: Request | None = None
        self.begun = self.closed = self.restarts = False
        self.ready_since = self.idle_since_ns = 0
        self.slot: tuple[int, int] | None = None


class NaiveSequencer:
    """What the sequencer promises, with no thought of cost: `sequences` are in the order in which they began."""

    def __init__(self, policy: SequencePolicy) -> None:
        self.policy = policy
        self.sequences: list[NaiveSequence] = []
        self.draining = False
        self.turn = 0
        rows = policy.queue.max_batch_rows if policy.groups else policy.max_candidates
        self.slots = [(row, group) for row in range(rows) for group in range(max(1, policy.groups))]

    @property
    def waiting(self) -> list[Request]:
        return [request for sequence in self.sequences for request in sequence.waiting]

    def find(self, sequence_id: int) -> NaiveSequence | None:
        return next((each for each in self.sequences if each.sequence_id == sequence_id), None)

    def owner(self, request: Request) -> NaiveSequence | None:
        return next((each for each in self.sequences if any(one is request for one in each.waiting)), None)

    def is_idle(self, sequence: NaiveSequence) -> bool:
        return not sequence.waiting and sequence.running is None

    def settle(self, now_ns: int) -> None:
        """End what is over, and give free slots away."""
        for each in list(self.sequences):
            over = each.closed or not each.begun or self.draining
            if self.is_idle(each) and (over or each.idle_since_ns + self.policy.max_idle_ns <= now_ns):
                self.sequences.remove(each)
        for each in self.sequences:
            taken = {other.slot for other in self.sequences}
            free = [slot for slot in self.slots if slot not in taken]
            if each.slot is None and free:
                each.slot = free[0]
                self.becomes_ready(each)

    def becomes_ready(self, sequence: NaiveSequence) -> None:
        self.turn += 1
        sequence.ready_since = self.turn

    def refusal(self, request: Request, now_ns: int) -> type | None:
        sequence, bounds = self.find(request.step.sequence_id), self.policy.queue
        if self.draining:
            return Draining
        if request.deadline_ns <= now_ns:
            return DeadlineExpired
        if not request.step.start and (sequence is None or sequence.closed):
            return SequenceNotStarted
        if bounds.max_queue_rows and len(self.waiting) >= bounds.max_queue_rows:
            return QueueFull
        if bounds.max_queue_bytes and request.size_bytes > bounds.max_queue_bytes:
            return RequestTooLarge
        total = sum(each.size_bytes for each in self.waiting) + request.size_bytes
        return QueueFull if bounds.max_queue_bytes and total > bounds.max_queue_bytes else None

    def accept(self, request: Request, now_ns: int) -> None:
        sequence = self.find(request.step.sequence_id)
        if sequence is None:
            sequence = NaiveSequence(request.step.sequence_id)
            self.sequences.append(sequence)
        elif self.is_idle(sequence):
            self.becomes_ready(sequence)
        sequence.closed = request.step.end
        sequence.waiting.append(request)
        self.settle(now_ns)

    def drop(self, request: Request, now_ns: int) -> None:
        sequence = self.owner(request)
        assert sequence is not None
        place = next(place for place, each in enumerate(sequence.waiting) if each is request)
        behind = sequence.waiting[place + 1 :]
        if request.step.start and behind:
            behind[0].step.start = True
        elif request.step.start:
            sequence.restarts = True
        del sequence.waiting[place]
        if self.is_idle(sequence):
            sequence.idle_since_ns = now_ns

    def expired(self, now_ns: int) -> list[Request]:
        return sorted((each for each in self.waiting if each.deadline_ns <= now_ns), key=lambda each: each.deadline_ns)

    def due(self, now_ns: int) -> list[NaiveSequence]:
        """The sequences of the next batch; none when nothing is due."""
        policy, found = self.policy, []
        for group in range(max(1, policy.groups)):
            mine = [each for each in self.sequences if each.slot is not None and each.slot[1] == group]
            if policy.groups and any(each.running is not None for each in mine):
                continue
            ready = sorted(
                (each for each in mine if each.waiting and each.running is None), key=lambda each: each.ready_since
            )
            for key in dict.fromkeys(each.waiting[0].key for each in ready):
                alike = [each for each in ready if each.waiting[0].key == key]
                enough = not self.delay_ns or len(alike) >= policy.enough
                due_ns = alike[0].waiting[0].enqueued_ns + (0 if enough else self.delay_ns)
                found.append((due_ns, alike))
        if not found or min(due_ns for due_ns, _ in found) > now_ns:
            return []
        alike = min(found, key=lambda each: each[0])[1]
        return alike[: self.length(alike, now_ns)]

    @property
    def delay_ns(self) -> int:
        return self.policy.queue.max_delay_ns if self.policy.enough and not self.draining else 0

    def length(self, alike: list[NaiveSequence], now_ns: int) -> int:
        fitting = min(len(alike), self.policy.queue.max_batch_rows)
        overdue = 0 < self.delay_ns <= now_ns - alike[0].waiting[0].enqueued_ns
        cuts = [rows for rows in self.policy.queue.preferred_batch_rows if rows <= fitting]
        return max(cuts) if cuts and not overdue else fitting

    def take(self, sequences: list[NaiveSequence]) -> list[Request]:
        if self.policy.groups:
            sequences = sorted(sequences, key=lambda each: each.slot or (0, 0))
        for each in sequences:
            each.running = each.waiting.pop(0)
            each.running.step.start |= each.restarts
            each.restarts, each.begun = False, True
        return [each.running for each in sequences if each.running is not None]

    def finish(self, request: Request, now_ns: int) -> None:
        for each in self.sequences:
            if each.running is request:
                each.running, each.idle_since_ns = None, now_ns
                self.becomes_ready(each)


@st.composite
def policies(draw: st.DrawFn) -> SequencePolicy:
    rows = draw(st.integers(1, 4))
    direct = draw(st.booleans())
    queue = QueuePolicy(
        max_batch_rows=rows,
        batching=True,
        max_delay_ns=draw(st.integers(0, 6)),
        preferred_batch_rows=() if direct else tuple(draw(st.lists(st.integers(1, rows), max_size=2))),
        max_queue_rows=draw(st.sampled_from([0, 0, 5, 20])),
        max_queue_bytes=draw(st.sampled_from([0, 0, 7, 40])),
    )
    idle_ns = draw(st.sampled_from([1, 8, 50]))
    if direct:
        groups, utilization = draw(st.integers(1, 2)), draw(st.sampled_from([0.0, 0.5, 1.0]))
        return SequencePolicy(queue=queue, max_idle_ns=idle_ns, groups=groups, min_utilization=utilization)
    return SequencePolicy(queue=queue, max_idle_ns=idle_ns, max_candidates=draw(st.integers(1, 6)))


class SequencerAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; what comes out must be the same, and every request leaves exactly once."""

    @initialize(policy=policies())
    def start(self, policy: SequencePolicy) -> None:
        self.sequencer: Sequencer[Request] = Sequencer(policy)
        self.model = NaiveSequencer(policy)
        self.now_ns = 0
        self.accepted: list[Request] = []
        self.left: list[Request] = []
        self.under_way: list[Request] = []

    @rule(
        sequence_id=st.integers(1, 6),
        start=st.sampled_from([True, False, False]),
        end=st.sampled_from([True, False, False]),
        size_bytes=st.integers(0, 9),
        key=st.sampled_from("aab"),
        life_ns=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    )
    def offer(self, sequence_id: int, start: bool, end: bool, size_bytes: int, key: str, life_ns: int | None) -> None:
        request = Request(1, size_bytes, key, NO_DEADLINE if life_ns is None else self.now_ns + life_ns)
        request.step = Step(sequence_id, start=start, end=end)
        self.model.settle(self.now_ns)
        expected = self.model.refusal(request, self.now_ns)
        error = self.sequencer.try_offer(request, self.now_ns)
        assert type(error) is (expected or type(None))
        if error is None:
            assert request.enqueued_ns == self.now_ns
            self.model.accept(request, self.now_ns)
            self.accepted.append(request)

    @rule(step_ns=st.integers(1, 5))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns

    def expire_in_model(self) -> list[Request]:
        self.model.settle(self.now_ns)
        expired = self.model.expired(self.now_ns)
        for request in expired:
            self.model.drop(request, self.now_ns)
            self.model.settle(self.now_ns)
        self.left += expired
        return expired

    @rule()
    def take(self) -> None:
        expired = self.expire_in_model()
        batch = self.model.take(self.model.due(self.now_ns))
        starts = [request.step.start for request in batch]
        assert self.sequencer.take(self.now_ns) == (batch, expired)
        assert [request.step.start for request in batch] == starts
        assert all(request.deadline_ns > self.now_ns for request in batch)
        self.left += batch
        self.under_way += batch
        ids = [request.step.sequence_id for request in self.under_way]
        assert len(set(ids)) == len(ids), "no two of a sequence are under way"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(request)
        self.sequencer.finish([request, request], self.now_ns)
        self.model.finish(request, self.now_ns)
        self.model.settle(self.now_ns)

    @rule()
    def expire(self) -> None:
        expired = self.expire_in_model()
        assert self.sequencer.expire(self.now_ns) == expired

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        waits = self.model.owner(request) is not None
        assert self.sequencer.cancel(request) is waits
        if waits:
            self.model.drop(request, self.sequencer._now_ns)
            self.model.settle(self.sequencer._now_ns)
            self.left.append(request)

    @rule(really=st.sampled_from([False] * 14 + [True]))
    def drain(self, really: bool) -> None:
        if really:
            self.sequencer.drain()
            self.model.draining = True
            self.model.settle(self.sequencer._now_ns)

    @invariant()
    def the_counts_are_those_of_what_waits_and_within_the_bounds(self) -> None:
        waiting, policy = self.model.waiting, self.model.policy.queue
        assert len(self.sequencer) == self.sequencer.rows == len(waiting)
        assert self.sequencer.size_bytes == sum(request.size_bytes for request in waiting)
        assert not policy.max_queue_rows or len(waiting) <= policy.max_queue_rows
        assert self.sequencer.live == len(self.model.sequences)
        assert len(self.sequencer._deadlines) <= 2 * len(waiting) + 64

    @invariant()
    def the_slots_are_those_of_the_model(self) -> None:
        free = set(self.model.slots) - {each.slot for each in self.model.sequences}
        assert set(self.sequencer._free) == free
        for each in self.model.sequences:
            assert self.sequencer._live[each.sequence_id].row == (each.slot and each.slot[0])

    @invariant()
    def what_is_due_makes_itself_known(self) -> None:
        wakeup_ns = self.sequencer.next_wakeup_ns()
        due = bool(self.model.due(self.now_ns) or self.model.expired(self.now_ns))
        if due:
            assert wakeup_ns is not None
            assert wakeup_ns <= self.now_ns
        elif wakeup_ns is not None and wakeup_ns <= self.now_ns:
            idle = [each for each in self.model.sequences if self.model.is_idle(each)]
            assert any(each.idle_since_ns + self.model.policy.max_idle_ns <= self.now_ns for each in idle)

    @invariant()
    def the_next_deadline_is_the_earliest_of_what_expires(self) -> None:
        ends_ns = [each.deadline_ns for each in self.model.waiting if each.deadline_ns != NO_DEADLINE]
        idle = [each for each in self.model.sequences if self.model.is_idle(each)]
        ends_ns += [each.idle_since_ns + self.model.policy.max_idle_ns for each in idle]
        assert self.sequencer.next_deadline_ns() == min(ends_ns, default=None)

    def teardown(self) -> None:
        if not hasattr(self, "sequencer"):
            return
        self.sequencer.drain()
        self.model.draining = True
        self.model.settle(self.sequencer._now_ns)
        while self.sequencer or self.under_way:
            for request in list(self.under_way):
                self.under_way.remove(request)
                self.sequencer.finish([request], self.now_ns)
                self.model.finish(request, self.now_ns)
                self.model.settle(self.now_ns)
            self.take()
        assert self.sequencer.live == 0
        assert sorted(map(id, self.left)) == sorted(map(id, self.accepted))


TestSequencerAgainstModel = SequencerAgainstModel.TestCase
TestSequencerAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)
