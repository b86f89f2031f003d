"""The passes between products of the Triton backend's exact solve, each beside plain torch."""

import pytest
import torch

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.decorate.api import TOL
from tailor_fast.testing import assert_within

from .problems import Problem, bare, correlated, damped, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_unavailable("triton", DEVICE) is not None, reason=str(why_unavailable("triton", DEVICE))
)
exact = pytest.importorskip("tailor_fast.ops.decorate.triton.exact")
proof = pytest.importorskip("tailor_fast.ops.decorate.triton.proof")
systems = pytest.importorskip("tailor_fast.ops.decorate.triton.system")

DTYPES = (torch.float64, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    """Once is enough: these tests name their backend."""


def on_device(problem: Problem) -> Problem:
    return Problem(*(part.to(DEVICE) for part in problem))


def within_float64(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums of some 40 float64 products, 2^-48 of the result or so."""
    assert_within(actual, expected, expected * (1 - 2.0**-48), torch.float64)


@pytest.mark.parametrize("right_side", [False, True])
def test_some_rows_move_where_they_lie(right_side: bool) -> None:
    """A step of rows 5, 1 and 2, of which row 1 gets worse: formulas in plain torch."""
    problem = on_device(correlated(6, 40, density=0.5))
    delta, mask, gram = problem
    rhs = delta @ gram + 0.1 if right_side else None
    system = systems.System(gram, 0.1)
    tile = exact._Rows(exact.Problem(system, TOL, 10), delta, mask, rhs)
    p = bare(problem).double()
    r, loss = tile.evaluate(p)
    state = proof.State(p, r, loss, tile.floor(p, loss))
    rows = torch.tensor([5, 1, 2], device=DEVICE)
    size = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    factor = torch.rand(40, device=DEVICE).double() + 0.5
    start = proof.start_of(state, rows, size, factor)
    assert_within(start, r[rows] / size[:, None] * factor, r[rows].float() / size[:, None])
    step = (r[rows] * 1e-2).float()
    step[1] *= -1
    part = exact._Rows(tile.problem, delta[rows], mask[rows], None if rhs is None else rhs[rows])
    known = None if right_side else part.delta
    candidate, given = proof.candidate_of(state, rows, step, size, factor, known)
    within_float64(candidate, p[rows] + step * factor * size[:, None])
    within_float64(given, candidate if right_side else delta[rows] - candidate)
    after, value = part.evaluate(candidate)
    old = [tensor.clone() for tensor in state]
    damping = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
    now = proof.improve_(
        state, rows, candidate, system.undamped(given), part.delta, part.keep, part.rhs, damping
    )
    new = (candidate, after, value, part.floor(candidate, value))
    for here, before, expected in zip(state, old, new, strict=True):
        within_float64(here[rows[[0, 2]]], expected[[0, 2]])
        assert torch.equal(here[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    within_float64(now, state.residual[rows].norm(dim=1))


@pytest.fixture(scope="module")
def wide() -> tuple[Problem, systems.System]:
    """More columns than a program takes at once; the halves of the matrix are made once."""
    problem = correlated(3, 1100, density=0.4)
    return problem, systems.System(problem.gram.to(DEVICE), 0.1)


def test_a_product_with_the_matrix_from_halves(wide) -> None:
    """22 bits of the matrix and of the vector, as of float32; nothing outside the support."""
    problem, system = wide
    x, keep, gram = problem
    found, energy = (part.cpu() for part in system.approximate(*on_device(problem)[:2]))
    best, plain = (x.to(half) @ damped(gram, 0.1).to(half) for half in DTYPES)
    assert_within(found[keep], best[keep], plain[keep])
    assert not found[~keep].any()
    assert_within(energy, (best * x).sum(1), (plain * x).sum(1))


def test_the_lower_bits_of_the_matrix_are_made_up_for(wide) -> None:
    """What is taken from a residual, and its size; nothing outside the support."""
    problem, system = wide
    delta, keep, _ = on_device(problem)
    residual = delta.masked_fill(~keep, 0)
    z = torch.randn_like(residual).masked_fill(~keep, 0)
    found = residual.clone()
    size = system.correct_(found, z, keep)
    low = system.halves[1].double() / systems.UNIT
    best = residual - (z.double() @ low).masked_fill(~keep, 0)
    plain = residual - (z.half().float() @ low.float()).masked_fill(~keep, 0)
    assert_within(found, best, plain)
    assert not found[~keep].any()
    scaled = found.double().square() * system.root.square()
    assert_within(size, scaled.sum(1), scaled.float().sum(1))


def test_how_small_a_residual_proves_a_row() -> None:
    """``|r|² / λ`` is then ``tol`` of what the minimum is at least."""
    problem, damping = drawn(3, 5, 10, 0.5, 0.0, 4), 0.1
    system = systems.System(problem.gram, damping)
    tile = exact._Rows(exact.Problem(system, 0.01, 10), problem.delta, problem.mask, None)
    floor, rounding = torch.tensor([2.0, -1.0, 2.0]).double(), torch.tensor([0.0, 0.3, 9.0])
    size = tile.limit(floor, rounding.double()).tolist()
    excess = size[0] ** 2 / damping
    assert excess == pytest.approx(0.01 * (2.0 - excess), rel=1e-12)
    assert size[1:] == [pytest.approx(0.3), 9.0]
    p = bare(problem).double()
    loss = tile.evaluate(p)[1]
    assert torch.equal(tile.floor(p, loss), loss)
    apart = (problem.delta - p).square().sum(1) * damping
    assert torch.equal(tile._replace(rhs=problem.delta).floor(p, loss), apart)
