"""Every tensor between the kernels is made where the problem is: no card is needed to see it.

``meta`` stands for the card: an op on tensors of two devices fails there as it would on a card.
Kernels are replaced by what looks at their arguments, and what the host reads by fixed numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tailor_fast.ops.decorate import triton as kernels
from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.triton import cg, exact, official, proof, sweep
from tailor_fast.ops.decorate.triton import system as systems

CARD = torch.device("meta")
ROWS, COLS = 40, 300


class Looks:
    """Stands for a kernel: all tensors it is launched on are on the card, with whole rows."""

    launched: set[str]

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, _grid: object) -> Any:
        def launch(*args: object, **_constants: object) -> None:
            for tensor in args:
                if isinstance(tensor, torch.Tensor):
                    assert tensor.device == CARD, self.name
                    assert tensor.stride(-1) == 1, self.name
            Looks.launched.add(self.name)

        return launch


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    """Once is enough: these tests name their backend."""


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    Looks.launched = set()
    for module in (systems, cg, proof, sweep):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Looks(name))
    monkeypatch.setattr(torch.Tensor, "item", lambda _tensor: 0.5)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _tensor: 0)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _tensor: 0.5)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _tensor: True)


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CARD)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return there(ROWS, COLS), there(ROWS, COLS, dtype=torch.bool), there(COLS, COLS)


def test_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, keep, gram = problem()
    # The first look: all go on, none has done a step; from then on none goes on.
    looks = iter([[ROWS, 0], [0, 3]])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _tensor: next(looks))
    system, live = systems.System(gram, 0.1), there(ROWS, dtype=torch.bool)
    found = cg.conjugate_gradients(system, residual, keep, live, there(ROWS), 100)
    assert (found[0].device, found[1]) == (CARD, 3)
    assert Looks.launched == {"_halves_kernel", "_update_kernel"}


@pytest.mark.parametrize("rhs", [False, True])
def test_from_a_residual_to_a_proof(rhs: bool) -> None:
    delta, keep, gram = problem()
    system, right = systems.System(gram, 0.1), there(ROWS, COLS) if rhs else None
    wide, row = there(ROWS, COLS, dtype=torch.float64), there(ROWS, dtype=torch.float64)
    state = proof.State(wide, wide, row, row)
    rows = there(ROWS, dtype=torch.int64)
    proof.start_of(state, rows, row, system.root)
    candidate, lacking = proof.candidate_of(
        state, rows, delta, row, system.root, None if rhs else delta
    )
    damping = there(1, dtype=torch.float64)
    product = system.undamped(lacking)
    size = proof.improve_(state, rows, candidate, product, delta, keep, right, damping)
    assert size.device == CARD
    equations = exact._Rows(exact.Problem(system, 1e-4, 100), delta, keep, right)
    for part in (*equations.evaluate(wide), *equations.estimate(bare=True)):
        assert part.device == CARD
    assert Looks.launched >= {"_start_kernel", "_candidate_kernel", "_proof_kernel"}


def test_products_and_energies(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, keep, gram = problem()
    system = systems.System(gram, 0.1)
    for small in (False, True):
        monkeypatch.setattr(systems, "FLOAT16_FROM", 1 << 40 if small else 0)
        assert system.energy(delta).device == CARD
    assert {part.device for part in system.approximate(delta, keep)} == {CARD}
    assert system.correct_(delta, delta, keep).device == CARD
    launched = {"_halves_kernel", "_split_kernel", "_finish_kernel", "_correct_kernel"}
    assert Looks.launched == launched


def test_the_sweep_and_its_factor() -> None:
    delta, keep, gram = problem()
    factor = kernels.factor_obs(gram, 0.01)
    assert {part.device for part in factor} == {CARD}
    for given in (None, factor):
        found = kernels.decorate_obs(delta, keep, gram, 0.01, given)
        assert {part.device for part in found} == {CARD}
    assert "_obs_kernel" in Looks.launched


@pytest.mark.parametrize("groups", [(0, 0), (2, 4)])
def test_the_authors_sweep(groups: tuple[int, int]) -> None:
    weight, base = (there(ROWS, COLS, dtype=torch.bfloat16) for _ in range(2))
    options = OfficialOptions(0.9, (0.6, 0.4), 128, 0.01, *groups, reproduce_nan=False)
    found = official.decorate_official_(weight, base, there(COLS, COLS), None, options)
    assert {part.device for part in found} == {CARD}
    assert "_block_kernel" in Looks.launched
