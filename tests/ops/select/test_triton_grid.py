"""Many tensors in one grid of the Triton backend: each has the mask that it has by itself."""

from typing import Any

import pytest
import torch

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.select import reference
from tailor_fast.ops.select.options import Scoring
from tests.ops.select.cases import DTYPES, make_pair, tied_pair

WHY_NOT = why_unavailable("triton", "cpu")
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    # numpy warns where the interpreter meets the zero spread of a unit, or a NaN on purpose.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
if WHY_NOT is None:
    from tailor_fast.ops.select.triton import masks
    from tailor_fast.ops.select.triton.masks import Tuning

SAMPLED = 1  # `bracket_from`: every unit is


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that no wide load takes."""
    room = torch.empty(x.numel() + 3, dtype=x.dtype)
    room[3:] = x.flatten()
    return room[3:].view(x.shape)


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each grid takes."""
    found: list[int] = []
    real = masks._select_listed

    def spy(members: Any, *rest: Any) -> torch.Tensor:
        found.append(len(members))
        return real(members, *rest)

    monkeypatch.setattr(masks, "_select_listed", spy)
    return found


@pytest.mark.parametrize(
    ("normalize", "scope"),
    [("row_block", "block"), ("row", "tensor"), ("none", "row")],
)
def test_many_tensors_in_one_grid(
    normalize: str, scope: str, grids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other dtypes, addresses and sizes beside them; some are too small for a sample."""
    monkeypatch.setattr(masks, "AT_ONCE", 40_000)
    shapes = [(70, 256), (3, 300), (64, 512), (0, 40), (40, 384), (30, 130), (1, 1)]
    pairs: list[Any] = [
        make_pair(*shape, DTYPES[seed % 2], seed=seed) for seed, shape in enumerate(shapes)
    ]
    pairs += [tied_pair(20, 300), tuple(unaligned(x) for x in pairs[2])]
    scorings = [Scoring("obs", 0.5, normalize, name=str(i)) for i in range(len(pairs))]
    found = masks.select_patches(pairs, scorings, scope, 0.1, Tuning(bracket_from=1500))
    for mask, pair, scoring in zip(found, pairs, scorings, strict=True):
        assert torch.equal(mask, reference.select_patch(*pair, scoring, scope, 0.1))
    assert (grids == []) if scope == "row" else (max(grids) > 1)


def test_what_a_grid_takes(grids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "AT_ONCE", 3 * 64 * 256)
    pairs = [make_pair(64, 256, seed=seed) for seed in range(7)]
    pairs.insert(3, make_pair(200, 256))  # alone, because it is larger than a grid
    masks.select_patches(
        pairs, [Scoring("obs", 1.0, "none")] * 8, "tensor", 0.1, Tuning(bracket_from=SAMPLED)
    )
    assert grids == [3, 1, 3, 1]


def test_one_failed_bracket_costs_its_own_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties that no list holds, between two ordinary tensors."""
    heavy = torch.zeros(64, 256), torch.ones(64, 256), torch.ones(256)
    pairs = [make_pair(64, 256, seed=1), heavy, make_pair(64, 256, seed=2)]
    scoring = Scoring("diag", 1.0, "none")
    seen: list[Any] = []
    real = masks._select_whole
    monkeypatch.setattr(masks, "_select_whole", lambda one: seen.append(one) or real(one))
    found = masks.select_patches(pairs, [scoring] * 3, "tensor", 0.1, Tuning(bracket_from=SAMPLED))
    for mask, pair in zip(found, pairs, strict=True):
        assert torch.equal(mask, reference.select_patch(*pair, scoring, "tensor", 0.1))
    assert [bool((one.pair.tuned == 1).all()) for one in seen] == [True]


def test_a_fault_among_many_tensors_is_named() -> None:
    pairs = [make_pair(40, 256, seed=seed) for seed in range(3)]
    pairs[1][1][7, 9] = float("nan")
    scorings = [Scoring("obs", 0.5, "row_block", "select_patches", name) for name in "abc"]
    with pytest.raises(ValueError, match="select_patches: scores of 'b' must be finite") as caught:
        masks.select_patches(pairs, scorings, "tensor", 0.1, Tuning(bracket_from=SAMPLED))
    assert f"got nan at linear index {7 * 256 + 9}." in str(caught.value)


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads a value back ends in one of these."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "cpu", "nonzero"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *given, _name=name, _real=real: waits.append(_name) or _real(self, *given),
        )
    pairs = [make_pair(64, 256, torch.bfloat16, seed=seed) for seed in range(5)]
    scorings = [Scoring("obs", 0.5, "row_block")] * 5
    masks.select_patches(pairs, scorings, "tensor", 0.1, Tuning(bracket_from=SAMPLED))
    assert waits == ["tolist"]
