"""``decorate_exact``: the minimum, whatever the problem, and never worse than doing nothing."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.decorate import Decorated, decorate_exact, decorate_obs, native, reference
from tailor_fast.ops.decorate.api import TOL
from tailor_fast.ops.decorate.reference import cg, exact
from tailor_fast.testing import assert_within

from .problems import Problem, bare, correlated, drawn, gram_of, objective, optimum

DTYPES = (torch.float64, torch.float32)
EPS = torch.finfo(torch.float32).eps
SEEDS = st.integers(0, 2**31)
PROBLEMS = st.builds(
    drawn,
    rows=st.integers(1, 5),
    cols=st.integers(1, 70),
    tokens=st.sampled_from([1, 2, 9, 40, 200]),
    density=st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.9, 1.0]),
    decades=st.sampled_from([0.0, 2.0, 6.0]),
    seed=SEEDS,
)


def scalar(value: float | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(1)


@settings(max_examples=300)
@given(problem=PROBLEMS, percdamp=st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]))
def test_is_at_the_minimum_of_every_problem(problem: Problem, percdamp: float) -> None:
    damping = problem.damping(percdamp)
    result = decorate_exact(*problem, percdamp=percdamp)
    assert not result.patch[~problem.mask].any()
    loss = objective(problem, result.patch, damping)
    undecorated = objective(problem, bare(problem), damping)
    reverted = objective(problem, torch.zeros_like(problem.delta), damping)
    smallest = objective(problem, optimum(problem, damping), damping)
    # Rounding the patch to float32 moves the loss by the square of that rounding.
    rounding = EPS**2 * reverted / percdamp
    assert loss <= smallest * (1 + TOL) + rounding
    assert loss <= undecorated + rounding
    swept = objective(problem, decorate_obs(*problem, percdamp=percdamp).patch, damping)
    assert loss <= swept * (1 + TOL) + rounding
    for reported, value in [
        (result.loss, loss),
        (result.loss_undecorated, undecorated),
        (result.loss_reverted, reverted),
    ]:
        assert abs(reported.item() - value) <= EPS * value + rounding


@settings(max_examples=150)
@given(problem=PROBLEMS, percdamp=st.sampled_from([1e-3, 1e-2, 1.0]), seed=SEEDS)
def test_is_at_the_minimum_for_any_right_side(problem: Problem, percdamp: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # A right side in the range of the Gram, as every mean of answers times inputs is.
    rhs = 1e-3 * torch.randn(problem.delta.shape, generator=generator) @ problem.gram
    damping = problem.damping(percdamp)
    result = decorate_exact(*problem, rhs, percdamp=percdamp, target_energy=0.0)
    assert not result.patch[~problem.mask].any()

    def loss(patch: torch.Tensor) -> float:
        p, delta, gram = patch.double(), problem.delta.double(), problem.gram.double()
        squares = (p @ gram * p).sum() + damping * (delta - p).square().sum()
        return (squares - 2 * (p * rhs).sum()).item()

    smallest = loss(optimum(problem, damping, rhs))
    zero = loss(torch.zeros_like(problem.delta))
    # The objective is known up to the target energy, which is at least what the minimum gains.
    scale = zero - smallest + damping * problem.delta.double().square().sum().item()
    assert loss(result.patch) <= smallest + TOL * scale
    assert loss(result.patch) <= min(loss(bare(problem)), zero) + EPS * scale
    hurried = decorate_exact(*problem, rhs, percdamp=percdamp, max_iterations=1)
    assert loss(hurried.patch) <= min(loss(bare(problem)), zero) + EPS * scale
    for reported, patch in [
        (result.loss, result.patch),
        (result.loss_undecorated, bare(problem)),
        (result.loss_reverted, torch.zeros_like(problem.delta)),
    ]:
        size = scale + abs(loss(patch))
        assert abs(reported.item() - loss(patch)) <= EPS * size / percdamp


def test_beats_the_sweep_by_far_on_correlated_inputs() -> None:
    problem = correlated(512, 512)
    damping = problem.damping(0.01)
    result, obs = decorate_exact(*problem), decorate_obs(*problem)
    assert objective(problem, result.patch, damping) <= 0.6 * objective(problem, obs.patch, damping)
    assert int(result.iterations) <= 30
    assert obs.loss < obs.loss_undecorated


@pytest.mark.parametrize("scale", [1e-20, 1.0, 3e15])
def test_without_correlation_nothing_moves(scale: float) -> None:
    problem = drawn(7, 33, 50, 0.3, 0.0, 1)
    result = decorate_exact(problem.delta, problem.mask, scale * torch.eye(33))
    assert torch.equal(result.patch, bare(problem))
    assert int(result.iterations) == 0


@pytest.mark.parametrize(("gram_unit", "delta_unit"), [(1e-28, 1), (1e25, 1), (1, 1e-25), (1, 1e9)])
def test_units_do_not_matter(gram_unit: float, delta_unit: float) -> None:
    delta, mask, gram = correlated(30, 80, density=0.3)
    result = decorate_exact(delta * delta_unit, mask, gram * gram_unit)
    expected = decorate_exact(delta, mask, gram)
    ratio = result.loss / result.loss_reverted
    assert abs(ratio * expected.loss_reverted / expected.loss - 1) <= TOL
    assert result.iterations <= expected.iterations + 3


def test_full_and_empty_rows() -> None:
    problem = drawn(4, 50, 20, 0.5, 2.0, 2)
    problem.mask[0], problem.mask[2] = True, False
    result = decorate_exact(*problem)
    assert torch.equal(result.patch[0], problem.delta[0])
    assert not result.patch[2].any()
    everything = decorate_exact(problem.delta, torch.ones_like(problem.mask), problem.gram)
    assert torch.equal(everything.patch, problem.delta)
    nothing = decorate_exact(problem.delta, torch.zeros_like(problem.mask), problem.gram)
    assert not nothing.patch.any()
    assert torch.equal(nothing.loss, nothing.loss_reverted)
    assert torch.equal(nothing.loss, nothing.loss_undecorated)


def test_inputs_that_are_never_active() -> None:
    problem = drawn(4, 30, 60, 0.5, 0.0, 3)
    unseen = decorate_exact(problem.delta, problem.mask, torch.zeros_like(problem.gram))
    assert torch.equal(unseen.patch, bare(problem))
    assert unseen.loss.item() == 0.0
    dead = torch.arange(30) % 3 == 0
    gram = torch.where(dead[:, None] | dead, 0, problem.gram)
    result = decorate_exact(problem.delta, problem.mask, gram, percdamp=0.0)
    assert torch.equal(result.patch[:, dead], bare(problem)[:, dead])
    assert result.loss < result.loss_undecorated


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    delta, gram = torch.zeros(shape), torch.zeros(shape[1], shape[1])
    result = decorate_exact(delta, torch.zeros(shape, dtype=torch.bool), gram)
    assert result.patch.shape == shape
    assert [value.item() for value in result[1:]] == [0.0, 0.0, 0.0, 0]


def test_damping_is_percdamp_of_the_mean_diagonal() -> None:
    problem = drawn(5, 40, 80, 0.3, 2.0, 4)
    by_share = decorate_exact(*problem, percdamp=0.03)
    by_value = decorate_exact(*problem, percdamp=7.0, damping=problem.damping(0.03))
    assert all(torch.equal(a, b) for a, b in zip(by_share, by_value, strict=True))
    assert not torch.equal(by_share.patch, decorate_exact(*problem, percdamp=0.3).patch)


def test_right_side_of_the_delta_itself() -> None:
    """Small integers, whose products are exact in float32: both forms are then the same bits."""
    delta = torch.randint(-8, 9, (6, 24)).float()
    gram = gram_of(torch.randint(-4, 5, (64, 24)).double())
    mask = torch.rand(6, 24) < 0.3
    plain = decorate_exact(delta, mask, gram)
    rhs = delta @ gram
    energy = (rhs.double() * delta).sum()
    for target_energy in (energy, energy.item()):
        given = decorate_exact(delta, mask, gram, rhs, target_energy=target_energy)
        assert torch.equal(given.patch, plain.patch)
        for ours, other in zip(given[1:4], plain[1:4], strict=True):
            assert_within(scalar(ours), scalar(other), scalar(other))


def test_losses_are_undefined_without_the_energy() -> None:
    problem = drawn(5, 20, 40, 0.3, 0.0, 5)
    rhs = problem.delta @ problem.gram
    result = decorate_exact(*problem, rhs)
    assert torch.equal(result.patch, decorate_exact(*problem, rhs, target_energy=1.0).patch)
    assert all(value.isnan() for value in result[1:4])
    assert int(result.iterations) > 0


def test_few_iterations_are_better_than_none(caplog) -> None:
    problem = correlated(40, 96)
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        short = decorate_exact(*problem, max_iterations=2)
    assert int(short.iterations) == 4  # two in each precision
    assert short.loss < short.loss_undecorated
    assert "decorate_exact: 40 of 40 rows ended without proof" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        assert decorate_exact(*problem).loss < short.loss
    assert not caplog.text


def test_loose_tolerance_ends_earlier() -> None:
    problem = correlated(40, 96)
    loose, tight = decorate_exact(*problem, tol=1e-2), decorate_exact(*problem, tol=1e-10)
    assert loose.iterations < decorate_exact(*problem).iterations < tight.iterations
    best, plain = (optimum(problem, problem.damping(0.01), dtype=dtype) for dtype in DTYPES)
    assert_within(tight.patch, best, plain)
    assert tight.loss <= loose.loss <= 1.01 * tight.loss


def test_an_indefinite_matrix_never_makes_it_worse() -> None:
    problem = drawn(20, 30, 60, 0.4, 0.0, 6)
    values, vectors = torch.linalg.eigh(problem.gram)
    values[:10] *= -1
    gram = (vectors * values) @ vectors.T
    gram = (gram + gram.T) / 2
    gram.diagonal().clamp_(min=0.0)
    indefinite = problem._replace(gram=gram)
    result = decorate_exact(*indefinite, damping=0.0, max_iterations=20)
    assert int((result.patch != bare(indefinite)).any(1).sum()) > 10
    for row in range(20):
        one = Problem(problem.delta[row : row + 1], problem.mask[row : row + 1], gram)
        best = min(objective(one, bare(one), 0.0), objective(one, torch.zeros(1, 30), 0.0))
        assert objective(one, result.patch[row : row + 1], 0.0) <= best + EPS * abs(best)


def test_a_step_that_makes_it_worse_is_not_taken(monkeypatch) -> None:
    problem = correlated(12, 40, density=0.5)

    def astray(_system, residual, keep, _target, _limit) -> tuple[torch.Tensor, int]:
        step = torch.randn_like(residual)
        step[::2] = 0.01 * residual[::2]  # a little along the gradient, for half of the rows
        return torch.where(keep, step, 0), 1

    monkeypatch.setattr(exact, "conjugate_gradients", astray)
    result = decorate_exact(*problem, backend="reference")
    moved = (result.patch != bare(problem)).any(1)
    assert torch.equal(moved, torch.arange(12) % 2 == 0)
    assert result.loss < result.loss_undecorated


def test_starts_from_the_better_of_all_and_nothing() -> None:
    """A right side of zero wants no patch: one iteration from the delta would not undo it."""
    problem = correlated(20, 96, density=0.5)
    nothing = decorate_exact(*problem, torch.zeros(20, 96), target_energy=0.0, max_iterations=1)
    assert nothing.loss < nothing.loss_reverted < nothing.loss_undecorated
    wanted = decorate_exact(*problem, max_iterations=1)
    assert wanted.loss < wanted.loss_undecorated < wanted.loss_reverted


def test_a_flat_direction_ends_the_row() -> None:
    """Unbounded below: each precision takes the one step that its first direction allows."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    rhs = torch.tensor([[1.0, 0.0]])
    result = decorate_exact(
        torch.zeros(1, 2), mask, torch.ones(2, 2), rhs, damping=0.0, target_energy=5.0
    )
    assert result.patch.tolist() == [[1.0, -1.0]]
    assert result.loss.item() == 3.0


def test_one_weight_takes_one_iteration() -> None:
    problem = drawn(9, 30, 60, 0.0, 1.0, 10)
    problem.mask[:, 4] = True
    assert int(decorate_exact(*problem, percdamp=0.1).iterations) == 1


@pytest.mark.parametrize("right_side", [False, True])
def test_rows_do_not_depend_on_their_neighbours(monkeypatch, right_side: bool) -> None:
    """Tiles and the dropping of finished rows change the rounding at most."""
    problem = correlated(61, 48, density=0.3)
    problem.mask[::3] = torch.rand(21, 48) < 0.02
    problem.mask[-5:] = not right_side  # the last tile ends at once
    rhs = 1.1 * problem.delta @ problem.gram if right_side else None
    damping = problem.damping(0.01)
    best, plain = (optimum(problem, damping, rhs, dtype) for dtype in DTYPES)

    def solve(rows: slice) -> Decorated:
        part = None if rhs is None else rhs[rows]
        energy = None if rhs is None else 0.0
        return decorate_exact(
            problem.delta[rows],
            problem.mask[rows],
            problem.gram,
            part,
            target_energy=energy,
            tol=1e-10,
        )

    whole = solve(slice(None))
    monkeypatch.setattr(reference, "EXACT_TILE", 7 * 48)
    monkeypatch.setattr(native, "TILE", 7 * 48)
    monkeypatch.setattr(cg, "_PANEL", 13)
    tiled = solve(slice(None))
    alone = [solve(slice(row, row + 1)) for row in range(61)]
    for patch in (whole.patch, tiled.patch, torch.cat([one.patch for one in alone])):
        assert_within(patch, best, plain)
    assert int(tiled.iterations) >= max(int(one.iterations) for one in alone) > 0
    loss = sum(one.loss for one in alone)
    assert_within(scalar(tiled.loss), scalar(whole.loss), scalar(whole.loss))
    assert_within(scalar(loss), scalar(whole.loss), scalar(whole.loss))
