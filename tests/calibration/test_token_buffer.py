"""Tokens of small batches wait until there are enough of them, in order and each once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.calibration import token_buffer
from tailor_fast.calibration.moments import MomentSums
from tailor_fast.calibration.token_buffer import TokenBuffer
from tailor_fast.testing import assert_within

COLS = 3
AT_ONCE = 8


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_buffer, "TOKENS_AT_ONCE", AT_ONCE)


def numbered(first: int, count: int) -> torch.Tensor:
    return torch.arange(first * COLS, (first + count) * COLS).view(count, COLS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2 * AT_ONCE), st.booleans()), max_size=12))
def test_every_token_comes_once_and_in_order(batches: list[tuple[int, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(token_buffer, "TOKENS_AT_ONCE", AT_ONCE)
        held, given_, came, first = TokenBuffer(), [], [], 0
        for count, paired in batches:
            x = numbered(first, count)
            other = -x if paired else None
            given_ += [(row, paired) for row in x.tolist()]
            for part in held.put(x, other):
                came.append((part[0].clone(), None if part[1] is None else part[1].clone()))
            x.zero_()  # it was copied, or was yielded
            first += count
        came += list(held.take())
    for ours, theirs in came:
        assert theirs is None or torch.equal(theirs, -ours)
    assert [(row, theirs is not None) for ours, theirs in came for row in ours.tolist()] == given_
    # What waits together is never cut, and no product is smaller than it has to be.
    for (ours, theirs), (after, others) in pairwise(came):
        assert (theirs is None) != (others is None) or len(ours) + len(after) > AT_ONCE
    assert list(held.take()) == []


def test_what_was_used_gives_its_room_to_what_comes() -> None:
    held = TokenBuffer()
    came = [ours for first in range(6) for ours, _ in held.put(numbered(first, 5), None)]
    assert [len(ours) for ours in came] == [5] * 5
    assert len({ours.data_ptr() for ours in came}) == 1


def test_moments_do_not_depend_on_how_tokens_come() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, COLS, generator=generator)
    target = x + 0.1 * torch.randn(40, COLS, generator=generator)
    mask = torch.rand(40, generator=generator) > 0.3
    target[:10] = x[:10]  # the first batches are equal in both streams
    found = []
    for step in (5, 40):
        sums = MomentSums("layer")
        for begin in range(0, 40, step):
            rows = slice(begin, begin + step)
            sums.add(x[rows].clone(), mask[rows], "batch", target[rows].clone())
        found.append(sums.finish())
    assert found[0] is not None
    assert found[0].tokens == int(mask.sum())
    truths, plain = means(x[mask].double(), target[mask].double()), means(x[mask], target[mask])
    for moments in found:
        for name, truth in truths.items():
            assert_within(getattr(moments, name), truth, plain[name])


def means(x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``Moments`` holds, in the dtype of the inputs."""
    error = target - x
    sums = {
        "gram": x.T @ x,
        "mean": x.sum(0),
        "target_diag": target.square().sum(0),
        "cross": error.T @ x,
        "error_gram": error.T @ error,
        "error_mean": error.sum(0),
    }
    return {name: total / len(x) for name, total in sums.items()}


def test_a_batch_without_counted_tokens_is_a_batch() -> None:
    sums = MomentSums("expert")
    sums.add(torch.ones(4, COLS), torch.zeros(4, dtype=torch.bool), "batch")
    found, tokens = sums.sums()
    assert tokens == 0
    assert torch.equal(found["gram"], torch.zeros(COLS, COLS))
    assert MomentSums("expert").finish() is None
