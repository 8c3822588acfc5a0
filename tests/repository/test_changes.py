"""What is told of a repository that is looked at again and again: every change once, and none until it has settled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sluice_server.repository.changes import ChangeDetector, Changes

LOOKS = st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), max_size=12)


def test_nothing_is_told_of_the_first_look_and_of_one_that_finds_the_same():
    detector = ChangeDetector({"m": 1})
    assert not detector.look({"m": 1})


def test_what_is_still_changing_is_not_told_and_what_has_settled_is_told_once():
    detector = ChangeDetector({})
    told = [detector.look(found) for found in ({"m": 1}, {"m": 2}, {"m": 2}, {"m": 2})]
    assert told == [Changes(), Changes(), Changes(changed=frozenset("m")), Changes()]


def test_what_is_away_for_one_look_has_not_gone():
    detector = ChangeDetector({"m": 1})
    assert [detector.look(found) for found in ({}, {"m": 1}, {"m": 1})] == [Changes()] * 3


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), LOOKS)
def test_who_follows_what_is_told_has_what_two_looks_in_a_row_have_found(first, looks):
    detector, last, followed = ChangeDetector(first), first, dict(first)
    for found in looks:
        changes = detector.look(found)
        assert changes.changed <= found.keys()
        assert not changes.gone & found.keys()
        for name in (*changes.gone, *changes.changed):
            assert followed.get(name) != found.get(name)  # or there would be nothing to tell
            assert last.get(name) == found.get(name)
        for name in changes.gone:
            del followed[name]
        followed |= {name: found[name] for name in changes.changed}
        assert all(followed.get(name) == found.get(name) for name in "abc" if last.get(name) == found.get(name))
        last = found
