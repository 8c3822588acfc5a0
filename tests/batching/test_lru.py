"""The table that is bounded in bytes: against a naive model, and by examples where memory or order could slip."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sluice_batching import LruTable

KEYS = [bytes([number]) for number in range(12)]

Entry = bytes
"""Of its own size."""


def put(table: LruTable[Entry], *entries: tuple[bytes, int]) -> None:
    table.put([key for key, _ in entries], [bytes(size) for _, size in entries])


class NaiveLru:
    """What the table promises, with no thought of cost: `entries` in order of their last use."""

    def __init__(self, max_bytes: int, entry_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entry_bytes = entry_bytes
        self.entries: list[tuple[bytes, Entry]] = []
        self.evictions = 0

    def find(self, key: bytes) -> Entry | None:
        return dict(self.entries).get(key)

    def discard(self, key: bytes) -> None:
        self.entries = [item for item in self.entries if item[0] != key]

    @property
    def size_bytes(self) -> int:
        return sum(len(entry) + self.entry_bytes for _, entry in self.entries)

    def put(self, keys: list[bytes], entries: list[Entry]) -> None:
        for key in keys:
            self.discard(key)
        for key, entry in zip(keys, entries, strict=True):
            if len(entry) + self.entry_bytes <= self.max_bytes:
                self.entries.append((key, entry))
                while self.size_bytes > self.max_bytes:
                    del self.entries[0]
                    self.evictions += 1

    def use(self, key: bytes) -> None:
        item = next(item for item in self.entries if item[0] == key)
        self.entries.remove(item)
        self.entries.append(item)


class LruAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; afterwards both hold the same, and would evict in the same order."""

    @initialize(max_bytes=st.integers(0, 40), entry_bytes=st.integers(0, 3))
    def start(self, max_bytes: int, entry_bytes: int) -> None:
        self.table: LruTable[Entry] = LruTable(max_bytes, entry_bytes=entry_bytes)
        self.model = NaiveLru(max_bytes, entry_bytes)
        self.count = 0

    @rule(sized=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 15), max_size=5))
    def put(self, sized: dict[bytes, int]) -> None:
        keys = list(sized)
        entries = [bytes([(self.count + number) % 256] * size) for number, size in enumerate(sized.values())]
        self.count += len(keys)
        self.table.put(keys, entries)
        self.model.put(keys, entries)

    @rule(key=st.sampled_from(KEYS))
    def use(self, key: bytes) -> None:
        if self.model.find(key) is not None:
            self.table.use(key)
            self.model.use(key)

    @rule(key=st.sampled_from(KEYS))
    def discard(self, key: bytes) -> None:
        assert self.table.discard(key) is (self.model.find(key) is not None)
        self.model.discard(key)

    @invariant()
    def both_hold_the_same(self) -> None:
        assert [self.table.peek(key) for key in KEYS] == [self.model.find(key) for key in KEYS]
        assert sorted(self.table.keys()) == sorted(key for key, _ in self.model.entries)
        assert len(self.table) == len(self.model.entries)
        assert self.table.has_none_of(KEYS) is not bool(self.model.entries)
        assert self.table.evictions == self.model.evictions

    @invariant()
    def the_sizes_add_up_and_keep_the_bound(self) -> None:
        assert self.table.size_bytes == self.model.size_bytes <= self.table.max_bytes

    @invariant()
    def memory_is_bounded_by_the_entries(self) -> None:
        assert len(self.table._order) <= 2 * len(self.table) + 64 + len(KEYS)
        assert len(self.table._stale) <= len(self.table._order)

    def teardown(self) -> None:
        """What is left goes in the order of its last use."""
        if not self.model.max_bytes:
            return
        for number in range(len(self.model.entries) + 1):
            filler = [bytes([200, number])], [bytes(max(0, min(self.model.max_bytes - self.model.entry_bytes, 3)))]
            self.table.put(*filler)
            self.model.put(*filler)
            assert set(self.table.keys()) == {key for key, _ in self.model.entries}


TestLruAgainstModel = LruAgainstModel.TestCase
TestLruAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)


def test_the_entry_that_was_not_used_for_longest_makes_room():
    table: LruTable[Entry] = LruTable(10)
    put(table, (b"a", 5), (b"b", 5))
    table.use(b"a")
    put(table, (b"c", 1))
    assert table.keys() == [b"a", b"c"]
    assert table.evictions == 1
    assert repr(table) == "<LruTable: 2 entries, 6 of 10 bytes>"


def test_looking_without_using_changes_no_order():
    table: LruTable[Entry] = LruTable(10)
    put(table, (b"a", 5), (b"b", 5))
    assert table.peek(b"a") == bytes(5)
    assert not table.has_none_of([b"a"])
    put(table, (b"c", 1))
    assert table.peek(b"a") is None


def test_an_entry_larger_than_the_table_takes_nobodys_place():
    table: LruTable[Entry] = LruTable(10)
    put(table, (b"a", 10))
    put(table, (b"b", 11))
    assert table.keys() == [b"a"]
    put(table, (b"a", 11))
    assert table.keys() == []
    assert table.evictions == table.size_bytes == 0


@given(st.integers(1, 5), st.integers(100, 2000))
def test_an_entry_that_is_used_for_ever_takes_no_more_memory(entries: int, uses: int):
    table: LruTable[Entry] = LruTable(100)
    put(table, *((KEYS[number], 1) for number in range(entries)))
    for number in range(uses):
        table.use(KEYS[number % entries])
    assert len(table._order) <= 2 * entries + 65


def test_putting_and_discarding_for_ever_takes_no_more_memory():
    table: LruTable[Entry] = LruTable(100)
    for _ in range(1000):
        put(table, (b"a", 1))
        assert table.discard(b"a")
    assert not table.discard(b"a")
    assert len(table._order) <= 65
