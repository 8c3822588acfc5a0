"""Which requests the trace settings choose, as traces of changes and requests."""

from __future__ import annotations

from sluice_server.observability.trace_sampling import Sample, TraceOptions, TraceSampler

ALL = TraceOptions(("TIMESTAMPS",), rate=1)


def chosen(sampler: TraceSampler, model: str, times: int) -> list[int]:
    """Which of so many requests are traced."""
    return [number for number in range(1, times + 1) if sampler.sample(model) is not None]


def test_off_chooses_nothing_and_is_not_armed():
    for options in (TraceOptions(), TraceOptions(("TENSORS",), rate=0), TraceOptions(("TENSORS",), count=0)):
        sampler = TraceSampler(options)
        assert not sampler.armed
        assert chosen(sampler, "m", 3000) == []


def test_models_without_values_of_their_own_share_the_servers_counters():
    sampler = TraceSampler(TraceOptions(("TIMESTAMPS",), rate=2, count=2))
    assert [sampler.sample(name) is not None for name in ("a", "b", "a", "b", "a", "b")] == [
        False, True, False, True, False, False,
    ]  # fmt: skip
    assert not sampler.armed


def test_a_sample_tells_whose_settings_chose_it():
    sampler = TraceSampler(ALL)
    sampler.change({"log_frequency": 5}, "a")
    assert sampler.sample("a") == Sample(("TIMESTAMPS",), 5, "a")
    assert sampler.sample("b") == Sample(("TIMESTAMPS",), 0, "")


def test_a_forced_request_is_chosen_at_any_rate_and_counts():
    sampler = TraceSampler(TraceOptions(("TIMESTAMPS",), rate=1000, count=2))
    assert sampler.sample("m", forced=True)
    assert sampler.options().count == 1
    assert sampler.sample("m", forced=True)
    assert sampler.sample("m", forced=True) is None


def test_another_setting_leaves_what_is_left_of_the_count():
    sampler = TraceSampler(TraceOptions(("TIMESTAMPS",), rate=1, count=3))
    chosen(sampler, "m", 2)
    sampler.change({"log_frequency": 7})
    assert sampler.options().count == 1
    sampler.change({"count": 3})
    assert sampler.options().count == 3


def test_a_models_count_is_its_own_from_when_it_is_set():
    sampler = TraceSampler(ALL)
    sampler.change({"count": 1}, "a")
    assert chosen(sampler, "a", 5) == [1]
    assert chosen(sampler, "b", 5) == [1, 2, 3, 4, 5]
    sampler.change({"rate": 2})
    assert sampler.options("a") == TraceOptions(("TIMESTAMPS",), rate=2, count=0)
    sampler.change({"count": None}, "a")
    assert chosen(sampler, "a", 4) == [2, 4]


def test_a_model_that_is_off_stays_off_when_the_server_is_switched_on():
    sampler = TraceSampler(TraceOptions())
    sampler.change({"levels": ()}, "a")
    sampler.change({"levels": ("TIMESTAMPS",), "rate": 1})
    assert sampler.armed
    assert chosen(sampler, "a", 3) == []
    assert chosen(sampler, "b", 3) == [1, 2, 3]


def test_clearing_gives_the_start_value_back():
    sampler = TraceSampler(TraceOptions(("TIMESTAMPS",), rate=5))
    sampler.change({"rate": 1, "levels": ()})
    sampler.change({"rate": None, "levels": None})
    assert sampler.options() == TraceOptions(("TIMESTAMPS",), rate=5)
    assert sampler.armed
