"""Spans of a ring never overlap, are whole pages, and all of it comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.patching.ring import Ring, Span, aligned

PAGE = 4096


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 9 * PAGE),  # take so many bytes
            st.integers(-3, -1),  # give back one of the oldest spans in use
        ),
        max_size=80,
    )
)
def test_spans_are_disjoint_and_all_room_comes_back(steps: list[int]) -> None:
    ring = Ring(16 * PAGE)
    used: dict[int, Span] = {}
    for number, step in enumerate(steps):
        if step >= 0:
            span = ring.take(step)
            if span is None:
                assert used  # an empty ring has room for everything
                continue
            assert len(span.view) == step
            assert span._begin % PAGE == 0
            for other in used.values():
                assert span._end <= other._begin or other._end <= span._begin
            span.view[:] = bytes([number % 251]) * step
            used[number] = span
        elif used:
            key = list(used)[min(-step - 1, len(used) - 1)]
            assert bytes(used[key].view) == bytes([key % 251]) * len(used[key].view)
            ring.give_back(used.pop(key))
    for span in used.values():
        ring.give_back(span)
    whole = ring.take(ring.size)
    assert whole is not None
    assert ring.take(1) is None


def test_memory_goes_round() -> None:
    ring = Ring(4 * PAGE)
    first, second, third = (ring.take(PAGE) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    ring.give_back(second)  # in the middle: no room yet
    assert ring.take(2 * PAGE) is None
    ring.give_back(first)
    again = ring.take(2 * PAGE)
    assert again is not None
    assert again._begin == 0
    assert ring.take(2 * PAGE) is None  # a page before the oldest span, none behind the newest
    ring.give_back(again)
    ring.give_back(third)
    assert ring.take(4 * PAGE) is not None


def test_sizes_are_whole_pages() -> None:
    assert [aligned(count) for count in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]
    assert Ring(1).size == PAGE
    with pytest.raises(ValueError, match=r"Ring\.take: count must be at most 4096; got 4097"):
        Ring(PAGE).take(PAGE + 1)
