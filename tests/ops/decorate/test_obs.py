"""``decorate_obs`` against a sweep over single columns, and Grams that do not factorise."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops import damping as damping_module
from tailor_fast.ops.decorate import (
    Decorated,
    decorate_obs,
    decorate_obs_,
    factor_obs,
    native,
    reference,
)
from tailor_fast.ops.decorate.reference import sweep as sweep_module
from tailor_fast.testing import assert_within

from .problems import Problem, bare, correlated, damped, drawn, objective, sweep

SHAPES = [(1, 1), (1, 40), (3, 7), (5, 127), (5, 128), (4, 129), (7, 300)]


def check_patch(problem: Problem, percdamp: float, given: Decorated | None = None) -> Decorated:
    hessian = damped(problem.gram, problem.damping(percdamp))
    nothing = torch.zeros_like(problem.delta)
    swept, plain = (
        sweep(problem.delta, nothing, ~problem.mask, hessian.to(dtype), sign=-1)
        for dtype in (torch.float64, torch.float32)
    )
    before = problem.delta.clone()
    result = given or decorate_obs(*problem, percdamp=percdamp)
    assert torch.equal(problem.delta, before)
    assert not result.patch[~problem.mask].any()
    assert_within(result.patch, swept[0], plain[0])
    assert int(result.iterations) == 0
    return result


def check(problem: Problem, percdamp: float) -> None:
    result, damping = check_patch(problem, percdamp), problem.damping(percdamp)
    hessian = damped(problem.gram, damping)
    for reported, patch in [
        (result.loss, result.patch),
        (result.loss_undecorated, bare(problem)),
        (result.loss_reverted, torch.zeros_like(problem.delta)),
    ]:
        error = problem.delta - patch
        single = ((error @ hessian.float()) * error).sum().reshape(1)
        expected = torch.tensor([objective(problem, patch, damping)], dtype=torch.float64)
        assert_within(reported.reshape(1), expected, single)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percdamp", [0.01, 0.5])
def test_is_the_sweep_over_single_columns(shape: tuple[int, int], percdamp: float) -> None:
    check(drawn(*shape, tokens=2 * shape[1], density=0.3, decades=1.0, seed=1), percdamp)


@settings(max_examples=60)
@given(
    rows=st.integers(8, 16),  # fewer, and plain float32 may be right by luck
    cols=st.integers(24, 60),
    density=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
def test_is_the_sweep_on_any_mask(rows: int, cols: int, density: float, seed: int) -> None:
    check_patch(drawn(rows, cols, 3 * cols, density, 0.0, seed), 0.1)


def test_lowers_the_loss_on_correlated_inputs() -> None:
    problem = correlated(96, 160)
    result = decorate_obs(*problem)
    assert result.loss < result.loss_undecorated < result.loss_reverted
    wrong_sign, _ = sweep(
        problem.delta,
        torch.zeros_like(problem.delta),
        ~problem.mask,
        damped(problem.gram, problem.damping(0.01)),
        sign=1,
    )
    assert objective(problem, wrong_sign, problem.damping(0.01)) > result.loss_undecorated.item()


def test_without_correlation_nothing_moves() -> None:
    problem = drawn(5, 200, 300, 0.3, 0.0, 2)
    result = decorate_obs(problem.delta, problem.mask, 0.25 * torch.eye(200))
    assert torch.equal(result.patch, bare(problem))


def test_inputs_that_are_never_active() -> None:
    problem = drawn(4, 150, 60, 0.5, 0.0, 3)
    result = decorate_obs(problem.delta, problem.mask, torch.zeros_like(problem.gram))
    assert torch.equal(result.patch, bare(problem))
    assert [value.item() for value in result[1:4]] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    result = decorate_obs(torch.zeros(shape), mask, torch.eye(shape[1]))
    assert result.patch.shape == shape
    assert result.loss.item() == 0.0


def test_tiles_and_panels(monkeypatch) -> None:
    monkeypatch.setattr(reference, "OBS_TILE", 3 * 300)
    monkeypatch.setattr(native, "TILE", 3 * 300)
    monkeypatch.setattr(sweep_module, "_PANEL", 70)
    check(drawn(8, 300, 600, 0.3, 1.0, 4), 0.01)


def test_factor_of_the_inverse() -> None:
    problem = correlated(1, 90)
    factor = sweep_module.factorize(problem.gram, 0.01)
    inverse = torch.linalg.inv(damped(problem.gram, factor.damping))
    assert factor.damping == problem.damping(0.01)
    assert torch.equal(factor.upper, factor.upper.triu())
    single = torch.linalg.inv(damped(problem.gram, factor.damping).float())
    product = factor.upper.double().T @ factor.upper.double()
    assert_within(product, inverse, single)


def test_singular_gram_takes_more_damping_and_says_so(caplog) -> None:
    """All inputs equal: the second pivot is exactly zero in every precision."""
    delta, mask = torch.randn(3, 12), torch.rand(3, 12) < 0.5
    problem = Problem(delta, mask, torch.ones(12, 12))
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        result = decorate_obs(*problem, percdamp=0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "decorate_obs: no Cholesky factor in torch.float32 at percdamp 0",
        "decorate_obs: no Cholesky factor in torch.float64 at percdamp 0",
        "decorate_obs: factorised in torch.float64 at percdamp 0.001",
    ]
    check_patch(problem, 0.001, result)
    reverted = objective(problem, torch.zeros_like(delta), 0.001)
    assert_within(*(torch.tensor([v]).double() for v in (result.loss_reverted, reverted, reverted)))


def test_float64_before_more_damping(caplog) -> None:
    """Fibonacci numbers: a determinant of 1, which float32 takes for zero or less."""
    gram = torch.tensor([[1346269.0, 2178309.0], [2178309.0, 3524578.0]])
    delta, mask = torch.ones(1, 2), torch.tensor([[False, True]])
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        result = decorate_obs(delta, mask, gram, percdamp=0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "decorate_obs: no Cholesky factor in torch.float32 at percdamp 0",
        "decorate_obs: factorised in torch.float64 at percdamp 0",
    ]
    best = torch.tensor([[0.0, 1 + 2178309 / 3524578]], dtype=torch.float64)
    assert_within(result.patch, best, best.float())


def test_indefinite_gram_is_refused() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="decorate_obs: gram must be positive definite") as caught:
        decorate_obs(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), gram)
    assert str(caught.value) == (
        "decorate_obs: gram must be positive definite with damping; got a failed Cholesky"
        " factorisation at percdamp 0.1. Hint: a mean of outer products is; was it accumulated and"
        " divided in full?"
    )


@pytest.mark.parametrize("cols", [1, 40, 128, 300])
def test_one_factor_serves_all_layers_of_a_gram(backend, monkeypatch, cols: int) -> None:
    """The same bits as without it, in both forms, and the Gram is factorised once."""
    factorised = []
    climb = damping_module.climb
    monkeypatch.setattr(
        damping_module, "climb", lambda *given: factorised.append(given) or climb(*given)
    )
    problem = drawn(7, cols, 3 * cols, 0.3, 1.0, 21)
    layers = [problem._replace(delta=problem.delta * scale) for scale in (1.0, -3.0)]
    apart = [decorate_obs(*layer, percdamp=0.02) for layer in layers]
    assert len(factorised) == 2
    factor = factor_obs(problem.gram, percdamp=0.02)
    assert factor.backend == backend
    assert factor.damping.item() == pytest.approx(problem.damping(0.02))
    base = torch.randn(7, cols).bfloat16()
    for layer, expected in zip(layers, apart, strict=True):
        result = decorate_obs(*layer, factor=factor)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        weights = [(base + layer.delta).bfloat16() for _ in range(2)]
        losses = decorate_obs_(weights[0], base, *layer[1:], percdamp=0.02)
        again = decorate_obs_(weights[1], base, *layer[1:], factor=factor, backend=factor.backend)
        assert torch.equal(*weights)
        assert losses == again
    assert len(factorised) == 5  # without the factor alone, and the factor itself


def test_a_factor_of_inputs_that_were_never_seen() -> None:
    problem = drawn(3, 130, 40, 0.4, 0.0, 2)
    problem = problem._replace(gram=torch.zeros(130, 130))
    factor = factor_obs(problem.gram)
    assert factor.damping.isnan()
    result = decorate_obs(*problem, factor=factor)
    assert torch.equal(result.patch, bare(problem))
    assert [value.item() for value in result[1:]] == [0.0, 0.0, 0.0, 0]


def test_a_factor_that_does_not_fit(backend) -> None:
    problem, other = drawn(3, 40, 80, 0.4, 0.0, 2), drawn(3, 41, 80, 0.4, 0.0, 2)
    factor = factor_obs(problem.gram)
    with pytest.raises(ValueError, match=r"factor.upper must be float32 \[41, 41\]"):
        decorate_obs(*other, factor=factor)
    with pytest.raises(TypeError, match="factor must be what factor_obs returns; got tuple"):
        decorate_obs(*problem, factor=tuple(factor))
    foreign = "reference" if backend == "native" else "native"
    with pytest.raises(ValueError, match=f"factor must be made by backend '{foreign}'; got one by"):
        decorate_obs(*problem, factor=factor, backend=foreign)
    with pytest.raises(ValueError, match="factor_obs: gram must be symmetric"):
        factor_obs(torch.triu(problem.gram))
    with pytest.raises(TypeError, match="factor_obs: gram must be"):
        factor_obs(problem.gram.double())
