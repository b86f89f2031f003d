"""A refitted mask is the best by the solution's own cost, and is used when old data is given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.ops.select import kept_count
from tailor_fast.patching import Recipe, tailor_model
from tailor_fast.patching.equations import System
from tailor_fast.patching.recipe import DEFAULT_REFITS
from tailor_fast.patching.refit import Exact, refit_mask
from tailor_fast.patching.tailor import Tailored
from tests.patching.toys import Toy, pair, token_batches

ROWS, COLS = 24, 256


def problem(*, with_rhs: bool = True, seed: int = 0) -> Exact:
    """Correlated inputs, and an answer that is not the delta's own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(COLS // 4, 600).T @ normal(COLS // 4, COLS) + 0.3 * normal(600, COLS)
    gram = x.T @ x / 600
    delta = normal(ROWS, COLS)
    rhs = (delta + 0.5 * normal(ROWS, COLS)) @ gram if with_rhs else None
    damping = 0.01 * gram.diagonal().mean().item()
    energy = torch.tensor(1e6, dtype=torch.float64) if with_rhs else None
    return Exact(delta, System(gram, rhs, damping, energy, 0.0), 1e-4, 60)


def damped(exact: Exact) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` and ``B`` in float64."""
    system, delta = exact.system, exact.delta.double()
    gram = system.gram.double()
    rhs = delta @ gram if system.rhs is None else system.rhs.double()
    return gram + system.damping * torch.eye(
        COLS, dtype=torch.float64
    ), rhs + system.damping * delta


def objective(exact: Exact, mask: torch.Tensor) -> float:
    """The damped objective, up to a constant, of the exact solve on ``mask``."""
    a, b = damped(exact)
    patch = exact.solve(mask).patch.double()
    return (((patch @ a) - 2 * b) * patch).sum().item()


def by_size(exact: Exact, density: float) -> torch.Tensor:
    """The mask of the largest deltas."""
    size = exact.delta.abs().flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.topk(kept_count(size.numel(), density)).indices] = True
    return mask.view(ROWS, COLS)


def refitted(exact: Exact, recipe: Recipe) -> torch.Tensor:
    mask = by_size(exact, recipe.density)
    return refit_mask(mask, [exact], recipe, ([slice(0, ROWS)], ALONE), "layer")


@pytest.mark.parametrize("with_rhs", [False, True])
def test_one_step_keeps_what_is_dearest_to_remove_from_the_dense_solution(with_rhs: bool) -> None:
    exact = problem(with_rhs=with_rhs)
    a, b = damped(exact)
    dense = torch.linalg.solve(a, b.T).T
    cost = dense.square() / torch.linalg.inv(a).diagonal()
    best = cost.flatten().topk(kept_count(cost.numel(), 0.1)).indices
    mask = refitted(exact, Recipe(refits=1))
    share = mask.flatten()[best].double().mean().item()
    assert share > 0.999  # but for ties in fp32
    assert int(mask.count_nonzero()) == len(best)


@pytest.mark.parametrize("seed", range(3))
def test_more_steps_lower_the_loss(seed: int) -> None:
    exact = problem(seed=seed)
    losses = [objective(exact, by_size(exact, 0.1))]
    losses += [objective(exact, refitted(exact, Recipe(refits=steps))) for steps in (1, 4)]
    assert losses[2] < losses[1] < losses[0], losses


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("scope", ["tensor", "row", "block", "layer"])
def test_every_unit_keeps_its_count(scope: str, density: float) -> None:
    exact = problem()
    recipe = Recipe(refits=3, scope=scope, density=density)
    mask = refitted(exact, recipe)
    if scope == "row":
        assert mask.sum(1).tolist() == [kept_count(COLS, density)] * ROWS
    elif scope == "block":
        kept = [int(part.count_nonzero()) for part in mask.split(128, dim=1)]
        assert kept == [kept_count(128 * ROWS, density)] * (COLS // 128)
    else:  # what the layer was given
        assert int(mask.count_nonzero()) == kept_count(ROWS * COLS, density)


def test_a_layers_own_density_counts() -> None:
    exact = problem()
    recipe = Recipe(refits=2, scope="row", density=0.5, densities={"lay": 0.25})
    mask = refitted(exact, recipe)
    assert mask.sum(1).tolist() == [COLS // 4] * ROWS


@pytest.mark.parametrize("with_rhs", [False, True])
@pytest.mark.parametrize("height", [1, 7, 12])
def test_rows_at_a_time_have_the_mask_of_all_rows(height: int, with_rhs: bool) -> None:
    whole, recipe = problem(with_rhs=with_rhs), Recipe(refits=3)
    system, tiles = whole.system, []
    for begin in range(0, ROWS, height):
        rows = slice(begin, begin + height)
        rhs = None if system.rhs is None else system.rhs[rows]
        part = System(system.gram, rhs, system.damping, system.target_energy, 0.0)
        tiles.append(Exact(whole.delta[rows], part, whole.tol, whole.max_iterations))
    mask = by_size(whole, 0.1)
    tiled = refit_mask(mask, tiles, recipe, ([slice(0, ROWS)], ALONE), "layer")
    assert (tiled ^ refitted(whole, recipe)).sum() <= 4  # ties in fp32


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_are_left_as_they_are(density: float) -> None:
    mask = refitted(problem(), Recipe(refits=2, density=density))
    assert int(mask.count_nonzero()) == int(density * ROWS * COLS)


class _Second(Processes):
    """Process 1 of 2; what process 0 sends is recorded."""

    def __init__(self, sent: Sequence[torch.Tensor]) -> None:
        super().__init__(1, 2)
        self._sent = iter(sent)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        if source == 0:
            tensor.copy_(next(self._sent))


def test_rows_of_several_processes_have_one_mask() -> None:
    whole = problem()
    a, b = damped(whole)
    dense = torch.linalg.solve(a, b.T).T
    cost = (dense.square() / torch.linalg.inv(a).diagonal()).float()
    parts = [slice(0, 10), slice(10, ROWS)]
    system = whole.system
    assert system.rhs is not None
    own = System(system.gram, system.rhs[10:], system.damping, system.target_energy, 0.0)
    exact = Exact(whole.delta[10:], own, whole.tol, whole.max_iterations)
    recipe = Recipe(refits=1)
    mask = by_size(whole, 0.1)
    together = refit_mask(mask, [exact], recipe, (parts, _Second([cost[:10]])), "layer")
    assert (together ^ refitted(whole, recipe)).sum() <= 2  # ties in fp32


def run(recipe: Recipe, *, retain: bool = True, wide: int = 24) -> Tailored:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, tuned = pair(Toy(width=wide, hidden=wide))
    old = token_batches(seed=5) if retain else None
    return tailor_model(base, tuned, token_batches(), recipe, retain_batches=old)


def test_old_data_asks_for_refits_by_default() -> None:
    done = run(Recipe(retain_weight=1.0))
    same = run(Recipe(retain_weight=1.0, refits=DEFAULT_REFITS))
    scored = run(Recipe(retain_weight=1.0, refits=0))
    assert any("4 refits" in note for note in done.report.notes)
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, same.model.state_dict()[name])
    first = (rows.report.linears[0].loss for rows in (done, scored))
    assert next(first) < next(first)  # one layer, the same system: the mask alone differs


@pytest.mark.parametrize(
    "recipe", [Recipe(sensitivity="ratio"), Recipe(salience_weight=0.2), Recipe(normalize="row")]
)
def test_a_chosen_score_is_used(recipe: Recipe) -> None:
    done = run(recipe)
    without = run(recipe.model_copy(update={"refits": 0}))
    assert not any("refits" in note for note in done.report.notes)
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name])


def test_without_old_data_the_score_chooses() -> None:
    done, without = (run(recipe, retain=False) for recipe in (Recipe(), Recipe(refits=0)))
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name])


def test_refits_need_an_exact_solve() -> None:
    message = (
        "refits choose the mask by exact solves; decorate='obs' has none; use decorate='exact'"
    )
    with pytest.raises(ValueError, match=message):
        Recipe(refits=2, decorate="obs")


def test_refits_leave_nothing_to_a_score() -> None:
    with pytest.raises(
        ValueError, match="refits choose the mask; normalize and sensitivity cannot"
    ):
        Recipe(refits=2, sensitivity="diag", normalize="row")


def test_refits_need_data() -> None:
    base, tuned = pair(Toy())
    with pytest.raises(UsageError, match="refits 2 needs data of the new task; got none"):
        tailor_model(base, tuned, None, Recipe(refits=2))
