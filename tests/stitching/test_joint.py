"""The joint system against the objective written out over explicit samples in fp64."""

from __future__ import annotations

import pytest
import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.processes import ALONE
from tailor_fast.calibration.moments import DiagonalMoments, MomentSums
from tailor_fast.ops.decorate import decorate_exact
from tailor_fast.patching import Recipe
from tailor_fast.patching.equations import Equations, Layer
from tailor_fast.patching.refit import refit_mask
from tailor_fast.stitching.joint import Answer, JointSums, require_grams
from tailor_fast.testing import assert_within

ROWS, COLS, TOKENS = 7, 10, 200
WEIGHTS = (1.0, 3.0)
PERCDAMP, RETAIN = 0.05, 0.3


def moments(x: torch.Tensor):
    sums = MomentSums("layer")
    sums.add(x, None, "batch")
    return sums.finish()


def problem():
    """Base, two tasks whose inputs differ tenfold in size, biases, inputs of old tasks."""
    base, bias = torch.randn(ROWS, COLS), torch.randn(ROWS)
    inputs = [torch.randn(TOKENS, COLS) + 0.3, 10.0 * torch.randn(TOKENS, COLS) - 1.0]
    tuned = [base + 0.1 * torch.randn(ROWS, COLS) for _ in WEIGHTS]
    biases = [bias + 0.1 * torch.randn(ROWS) for _ in WEIGHTS]
    return base, bias, inputs, tuned, biases, torch.randn(TOKENS, COLS) - 0.2


def joint(base, bias, inputs, tuned, biases, old):
    sums = JointSums(base, bias)
    for x, weight, out, share in zip(inputs, tuned, biases, WEIGHTS, strict=True):
        sums.add(Answer(weight, out, moments(x)), share)
    return sums.finish(None if old is None else moments(old), PERCDAMP, RETAIN)


def objective(p, base, bias, inputs, tuned, biases, old):
    """The joint objective at ``p``, in its dtype, with inputs as rows."""
    base, bias = base.to(p.dtype), bias.to(p.dtype)
    unit = inputs[0].to(p.dtype).square().mean()
    total = torch.zeros((), dtype=p.dtype)
    damping = PERCDAMP * unit
    for *tensors, share in zip(inputs, tuned, biases, WEIGHTS, strict=True):
        x, weight, out = (tensor.to(p.dtype) for tensor in tensors)
        error = x @ weight.T + out - x @ (base + p).T - bias
        scale = share / sum(WEIGHTS) * unit / x.square().mean()
        total = total + scale * error.square().sum() / TOKENS
    if old is not None:
        x = old.to(p.dtype)
        scale = RETAIN * (unit + damping) / x.square().mean()
        total = total + scale * (x @ p.T).square().sum() / TOKENS
    mean = sum(
        w / sum(WEIGHTS) * (t.to(p.dtype) - base) for w, t in zip(WEIGHTS, tuned, strict=True)
    )
    return total + damping * (mean - p).square().sum()


@pytest.mark.parametrize("retain", [False, True])
def test_the_system_is_the_gradient_of_the_joint_objective(retain: bool) -> None:
    *parts, old = problem()
    old = old if retain else None
    system = joint(*parts, old)
    p = torch.randn(ROWS, COLS)

    def written_out(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        at = p.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(at, *parts, old), at)
        return gradient, objective(torch.zeros_like(at), *parts, old).detach()

    expected, plain = written_out(torch.float64), written_out(torch.float32)
    damped = system.gram + system.damping * torch.eye(COLS)
    gradient = 2 * (p @ damped - system.rhs - system.damping * system.pull)
    assert_within(gradient, expected[0], plain[0])
    at_zero = system.target_energy + system.damping * system.pull.double().square().sum()
    assert_within(at_zero, expected[1], plain[1])
    assert (system.retain_scale > 0) == retain


def test_at_density_one_the_solution_is_the_dense_minimiser() -> None:
    *parts, old = problem()
    system = joint(*parts, old)
    mask = torch.ones(ROWS, COLS, dtype=torch.bool)
    patch = decorate_exact(
        system.pull,
        mask,
        system.gram,
        system.rhs,
        damping=system.damping,
        target_energy=system.target_energy,
    ).patch

    at = torch.zeros(ROWS, COLS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(at, *parts, old), at)
    hessian = torch.autograd.functional.hessian(
        lambda row: objective(torch.cat([row[None], at[1:].detach()]), *parts, old), at[0].detach()
    )  # the same for every row
    dense = -torch.linalg.solve(hessian, slope.T).T
    least = objective(dense, *parts, old)
    assert objective(patch.double(), *parts, old) <= least * (1 + 1e-4)
    assert torch.allclose(patch.double(), dense, rtol=0, atol=1e-3 * dense.abs().max().item())


@pytest.mark.parametrize("tile", [ROWS, 3])
def test_a_refitted_mask_and_its_patch_are_the_dense_solutions(tile: int) -> None:
    *parts, old = problem()
    system, recipe = joint(*parts, old), Recipe(refits=1, tol=1e-9)
    tiles = system.tiles(tile, recipe)
    assert [len(part.delta) for part in tiles] == ([ROWS] if tile == ROWS else [3, 3, 1])
    counted = torch.zeros(ROWS, COLS, dtype=torch.bool)
    counted[:, :3] = True
    mask = refit_mask(counted, tiles, recipe, ([slice(0, ROWS)], ALONE), "layer")

    at = torch.zeros(ROWS, COLS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(at, *parts, old), at)
    hessian = torch.autograd.functional.hessian(
        lambda row: objective(torch.cat([row[None], at[1:].detach()]), *parts, old), at[0].detach()
    )
    dense = -torch.linalg.solve(hessian, slope.T).T
    cost = dense.square() / torch.linalg.inv(hessian).diagonal()
    best = cost.flatten().topk(int(counted.count_nonzero())).indices
    assert set(mask.flatten().nonzero()[:, 0].tolist()) == set(best.tolist())

    expected = torch.zeros_like(dense)
    for row, kept in enumerate(mask):
        if kept.any():
            expected[row, kept] = torch.linalg.solve(hessian[kept][:, kept], -slope[row, kept])
    solved = [part.solve(rows) for part, rows in zip(tiles, mask.split(tile), strict=True)]
    patch = torch.cat([one.patch for one in solved]).double()
    assert torch.allclose(patch, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    least = objective(expected, *parts, old)
    assert objective(patch, *parts, old) <= least * (1 + 1e-6)
    assert sum(one.loss for one in solved).item() == pytest.approx(least.item(), rel=1e-4)


def test_a_single_task_is_equation_6() -> None:
    base, bias, (x, _), (tuned, _), (out, _), old = problem()
    equations = Equations(moments(x), moments(old), PERCDAMP, RETAIN)
    system = equations.system(Layer(base, tuned, bias, out, bias))
    sums = JointSums(base, bias)
    sums.add(Answer(tuned, out, moments(x)), 1.0)
    single = sums.finish(moments(old), PERCDAMP, RETAIN)
    assert torch.equal(single.gram, system.gram)
    assert torch.equal(single.rhs, system.rhs)
    assert torch.equal(single.pull, tuned - base)
    assert single.damping == system.damping
    assert single.retain_scale == system.retain_scale
    assert single.target_energy == system.target_energy


def test_the_size_of_a_tasks_inputs_does_not_count() -> None:
    base, bias, inputs, tuned, _, _ = problem()
    biases = [bias, bias]
    plain = joint(base, bias, inputs, tuned, biases, None)
    scaled = joint(base, bias, [inputs[0], 64.0 * inputs[1]], tuned, biases, None)
    assert torch.equal(plain.gram, scaled.gram)
    assert torch.equal(plain.rhs, scaled.rhs)


def test_error_is_the_mean_square_over_the_samples() -> None:
    base, bias, (x, _), (tuned, _), (out, _), _ = problem()

    def error(dtype: torch.dtype) -> torch.Tensor:
        w0, b0, w1, b1, rows = (t.to(dtype) for t in (base, bias, tuned, out, x))
        return (rows @ (w1 - w0).T + b1 - b0).square().sum() / TOKENS

    found = torch.tensor(Answer(tuned, out, moments(x)).error(base, bias), dtype=torch.float64)
    assert_within(found, error(torch.float64), error(torch.float32))


def test_diagonals_are_refused() -> None:
    with pytest.raises(InputError, match=r"task 'a': .* kind 'diag'; expected whole Grams"):
        require_grams("task 'a'", DiagonalMoments(torch.ones(3), 1))
