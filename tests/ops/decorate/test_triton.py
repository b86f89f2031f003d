"""``decorate_exact`` of the Triton backend: interpreted on CPU tensors, compiled on a GPU."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.decorate import Decorated, decorate_exact
from tailor_fast.ops.decorate.api import TOL
from tailor_fast.testing import assert_within

from .problems import Problem, bare, correlated, drawn, objective, optimum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_unavailable("triton", DEVICE) is not None, reason=str(why_unavailable("triton", DEVICE))
)
cg = pytest.importorskip("tailor_fast.ops.decorate.triton.cg")
exact = pytest.importorskip("tailor_fast.ops.decorate.triton.exact")
package = pytest.importorskip("tailor_fast.ops.decorate.triton")
proof = pytest.importorskip("tailor_fast.ops.decorate.triton.proof")
systems = pytest.importorskip("tailor_fast.ops.decorate.triton.system")

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float64, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    """Once is enough: these tests name their backend."""


def solve(problem: Problem, rhs: torch.Tensor | None = None, **options: object) -> Decorated:
    """On the device, back on the CPU."""
    tensors = [tensor.to(DEVICE) for tensor in problem]
    right = None if rhs is None else rhs.to(DEVICE)
    result = decorate_exact(*tensors, right, backend="triton", **options)
    return Decorated(*(value.cpu() for value in result))


def on_device(problem: Problem) -> Problem:
    return Problem(*(part.to(DEVICE) for part in problem))


def check_minimum(
    problem: Problem, result: Decorated, percdamp: float, rounding: float = EPS
) -> None:
    """Each row within the tolerance of its minimum, never worse than the bare mask; the losses."""
    damping = problem.damping(percdamp)
    best = optimum(problem, damping)
    assert not result.patch[~problem.mask].any()
    for row in range(len(best)):
        part = slice(row, row + 1)
        one = Problem(problem.delta[part], problem.mask[part], problem.gram)
        reverted = objective(one, torch.zeros_like(one.delta), damping)
        loss = objective(one, result.patch[part], damping)
        # Rounding the patch to float32 moves the loss by the square of that rounding.
        slack = EPS**2 * reverted / percdamp
        assert loss <= objective(one, best[part], damping) * (1 + TOL) + slack
        assert loss <= objective(one, bare(one), damping) + slack
    nothing = torch.zeros_like(problem.delta)
    for reported, patch in zip(result[1:4], (result.patch, bare(problem), nothing), strict=True):
        value = objective(problem, patch, damping)
        slack = EPS**2 * result.loss_reverted.item() / percdamp
        assert abs(reported.item() - value) <= rounding * value + slack


@settings(max_examples=12)
@given(
    rows=st.integers(1, 4),
    cols=st.integers(1, 50),
    tokens=st.sampled_from([1, 9, 200]),
    density=st.sampled_from([0.1, 0.3, 0.9]),
    decades=st.sampled_from([0.0, 2.0, 6.0]),
    percdamp=st.sampled_from([1e-3, 1e-2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_is_at_the_minimum(
    rows: int, cols: int, tokens: int, density: float, decades: float, percdamp: float, seed: int
) -> None:
    problem = drawn(rows, cols, tokens, density, decades, seed)
    check_minimum(problem, solve(problem, percdamp=percdamp), percdamp)


@pytest.mark.parametrize(("small", "scale"), [(True, 1.0), (False, 1.0), (False, 1e-9)])
def test_with_products_of_float16_alone(monkeypatch, small: bool, scale: float) -> None:
    """A large problem starts from approximate residuals; what it proves is exact all the same."""
    if not small:
        monkeypatch.setattr(systems, "FLOAT16_FROM", 0)
    problem = correlated(6, 120, 0.2)
    problem.delta.mul_(scale)
    problem.mask[0], problem.mask[1] = True, False
    proofs = []
    undamped = systems.System.undamped
    monkeypatch.setattr(
        systems.System, "undamped", lambda *given: proofs.append(given) or undamped(*given)
    )
    result = solve(problem)
    check_minimum(problem, result, 0.01, EPS if small else 1e-5)
    # One proof is enough, and rounding costs iterations, but not their number's order.
    assert len(proofs) == (3 if small else 1)
    reference = decorate_exact(*problem, backend="reference")
    assert int(result.iterations) <= 2 * int(reference.iterations)
    assert torch.equal(result.patch[0], problem.delta[0])
    plain = solve(problem, tol=1e-10)
    best, single = (optimum(problem, problem.damping(0.01), dtype=dtype) for dtype in DTYPES)
    assert_within(plain.patch, best, single)


@pytest.mark.parametrize("small", [True, False])
def test_right_side(monkeypatch, small: bool) -> None:
    if not small:
        monkeypatch.setattr(systems, "FLOAT16_FROM", 0)
    problem = correlated(4, 60, 0.3)
    problem.mask[3] = False
    rhs = problem.delta @ problem.gram + 1e-4 * torch.randn(4, 60) @ problem.gram
    result = solve(problem, rhs, target_energy=0.0, tol=1e-10)
    best, single = (optimum(problem, problem.damping(0.01), rhs, dtype) for dtype in DTYPES)
    assert_within(result.patch, best, single)
    damping, delta, gram = problem.damping(0.01), problem.delta.double(), problem.gram.double()

    def loss(patch: torch.Tensor) -> float:
        p = patch.double()
        squares = (p @ gram * p).sum() + damping * (delta - p).square().sum()
        return (squares - 2 * (p * rhs).sum()).item()

    nothing = torch.zeros_like(problem.delta)
    for reported, patch in zip(result[1:4], (result.patch, bare(problem), nothing), strict=True):
        size = abs(loss(bare(problem))) + damping * delta.square().sum().item()
        assert abs(reported.item() - loss(patch)) <= (EPS if small else 1e-5) * size
    undefined = solve(problem, rhs)
    assert all(value.isnan() for value in undefined[1:4])


def test_without_correlation_nothing_moves(monkeypatch) -> None:
    for limit in (systems.FLOAT16_FROM, 0):
        monkeypatch.setattr(systems, "FLOAT16_FROM", limit)
        problem = drawn(5, 33, 50, 0.3, 0.0, 1)
        result = solve(problem._replace(gram=0.25 * torch.eye(33)))
        assert torch.equal(result.patch, bare(problem))
        assert int(result.iterations) == 0


def test_inputs_that_are_never_active(monkeypatch) -> None:
    for limit in (systems.FLOAT16_FROM, 0):
        monkeypatch.setattr(systems, "FLOAT16_FROM", limit)
        problem = drawn(3, 30, 60, 0.5, 0.0, 3)
        unseen = solve(problem._replace(gram=torch.zeros(30, 30)))
        assert torch.equal(unseen.patch, bare(problem))
        assert unseen.loss.item() == 0.0
        dead = torch.arange(30) % 3 == 0
        gram = torch.where(dead[:, None] | dead, 0, problem.gram)
        result = solve(problem._replace(gram=gram), percdamp=0.0)
        assert torch.equal(result.patch[:, dead], bare(problem)[:, dead])
        assert result.loss < result.loss_undecorated


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    result = solve(Problem(torch.zeros(shape), mask, torch.zeros(shape[1], shape[1])))
    assert result.patch.shape == shape
    assert [value.item() for value in result[1:]] == [0.0, 0.0, 0.0, 0]


@pytest.mark.parametrize(("gram_unit", "delta_unit"), [(1e-28, 1), (1e25, 1), (1, 1e-25), (1, 1e9)])
def test_units_do_not_matter(gram_unit: float, delta_unit: float) -> None:
    delta, mask, gram = correlated(2, 60, density=0.3)
    result = solve(Problem(delta * delta_unit, mask, gram * gram_unit))
    expected = solve(Problem(delta, mask, gram))
    ratio = result.loss / result.loss_reverted
    assert abs(ratio * expected.loss_reverted / expected.loss - 1) <= TOL
    assert result.iterations <= expected.iterations + 3


def test_an_indefinite_matrix_never_makes_it_worse() -> None:
    problem = drawn(6, 30, 60, 0.4, 0.0, 6)
    values, vectors = torch.linalg.eigh(problem.gram)
    values[:10] *= -1
    gram = (vectors * values) @ vectors.T
    gram = (gram + gram.T) / 2
    gram.diagonal().clamp_(min=0.0)
    indefinite = problem._replace(gram=gram)
    patch = solve(indefinite, damping=0.0, max_iterations=12).patch
    for row in range(6):
        one = Problem(problem.delta[row : row + 1], problem.mask[row : row + 1], gram)
        best = min(objective(one, bare(one), 0.0), objective(one, torch.zeros(1, 30), 0.0))
        assert objective(one, patch[row : row + 1], 0.0) <= best + EPS * abs(best)


def test_rows_without_proof_are_left_to_the_reference(monkeypatch, caplog) -> None:
    """Rank 9 in 50 columns, next to no damping: float16 has no bits left for the difference."""
    seen = []
    fallback = exact._by_reference
    monkeypatch.setattr(
        exact, "_by_reference", lambda *given: seen.append(len(given[-1])) or fallback(*given)
    )
    problem = drawn(5, 50, 9, 0.3, 0.0, 3)
    problem.mask[4] = False
    result = solve(problem, percdamp=1e-5)
    assert seen == [4]
    check_minimum(problem, result, 1e-5)
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        short = solve(problem, percdamp=1e-5, max_iterations=2)
    assert short.loss < short.loss_undecorated
    assert "decorate_exact: 4 of 4 rows ended without proof" in caplog.text
    assert int(short.iterations) == 6  # two in each precision: float16, float32, float64


def test_a_step_that_makes_it_worse_is_not_taken(monkeypatch) -> None:
    problem = on_device(correlated(6, 40, density=0.5))

    def astray(_system, residual, keep, *_) -> tuple[torch.Tensor, int]:
        return torch.where(keep, torch.randn_like(residual), 0), 1

    monkeypatch.setattr(exact, "conjugate_gradients", astray)
    monkeypatch.setattr(exact, "_by_reference", lambda *given: pytest.fail("p and loss suffice"))
    system = systems.System(problem.gram, 0.1)
    tile = exact._Rows(exact.Problem(system, TOL, 10), problem.delta, problem.mask, None)
    p = bare(problem).double()
    r, loss = tile.evaluate(p)
    state = proof.State(p, r, loss, tile.floor(p, loss))
    before = [tensor.clone() for tensor in state]
    rows = torch.arange(6, device=DEVICE)
    stuck, _ = exact._improve(tile, state, torch.zeros_like(loss), rows, r.norm(dim=1))
    assert stuck.tolist() == rows.tolist()
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_the_objective_proves_with_fewer_iterations_than_the_distance() -> None:
    problem = correlated(3, 64, density=0.3)
    ours = solve(problem)
    bounded = solve(problem, rhs=problem.delta @ problem.gram)
    check_minimum(problem, ours, 0.01)
    assert ours.iterations < bounded.iterations


def test_rows_that_end_are_dropped(monkeypatch) -> None:
    """Rows of very different size: what each becomes must not depend on its neighbours."""
    problem = correlated(12, 48, density=0.3)
    problem.mask[::3] = torch.rand(4, 48) < 0.05
    best, single = (optimum(problem, problem.damping(0.01), dtype=dtype) for dtype in DTYPES)
    sizes = []
    update = cg._Tile.update
    monkeypatch.setattr(
        cg._Tile,
        "update",
        lambda self, *given: sizes.append(len(self.place)) or update(self, *given),
    )
    monkeypatch.setattr(cg, "LOOK_EVERY", 1)
    assert_within(solve(problem, tol=1e-10).patch, best, single)
    assert min(sizes) < 8 < max(sizes) == 12
    monkeypatch.setattr(package, "TILE", 5 * 48)
    tiled = solve(problem, tol=1e-10)
    assert_within(tiled.patch, best, single)
    assert max(sizes[-4:]) <= 5


def test_one_weight_takes_one_iteration() -> None:
    problem = drawn(4, 30, 60, 0.0, 1.0, 10)
    problem.mask[:, 4] = True
    assert int(solve(problem, percdamp=0.1).iterations) == 1


def test_same_bits_from_run_to_run() -> None:
    problem = correlated(3, 70, 0.2)
    first = solve(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, solve(problem), strict=True))


def test_the_matrix_in_two_halves() -> None:
    """22 bits of each entry, the damping on the diagonal, none of it anywhere else."""
    problem = drawn(9, 70, 40, 0.5, 6.0, 2)
    problem.gram[5], problem.gram[:, 5] = 0.0, 0.0
    for damping in (problem.damping(0.01), 0.0):
        system = systems.System(problem.gram.to(DEVICE), damping)
        high, low = (half.double().cpu() for half in system.halves)
        root = system.root.cpu()[:, None] * system.root.cpu()
        whole = (high + low) / systems.UNIT * system.mean * root
        expected = problem.gram.double() + damping * torch.eye(70)
        scale = system.mean * root
        assert bool(((whole - expected).abs() <= 2**-21 * scale).all())
        assert bool((high.diagonal() == systems.UNIT)[root.diagonal() > 0].all())
        x = problem.delta.to(DEVICE)
        exactly = system.multiply(x)
        answer, _ = system.approximate(x, torch.ones_like(x, dtype=torch.bool))
        error = (answer - exactly) / system.root.clamp_min(1e-30)
        scaled = (x.double() * system.root).norm(dim=1, keepdim=True) * system.mean
        assert bool((error.abs() <= 1e-5 * scaled).all())
        energies = (x * exactly).sum()
        assert abs(system.energy(x) / energies - 1) <= EPS


def test_entries_that_no_gram_has_are_held_in_range() -> None:
    gram = torch.tensor([[1e-6, 50.0], [50.0, 1.0]])
    high, low = systems.System(gram.to(DEVICE), 0.0).halves
    assert high.tolist() == [[systems.UNIT] * 2] * 2
    assert not bool(low.any())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 700])
def test_against_the_reference_at_size(rows: int) -> None:
    problem = correlated(rows, 1536)
    assert systems.System(problem.gram, 0.0).small(rows) == (rows == 1)
    result = solve(problem)
    other = decorate_exact(*(part.cuda() for part in problem), backend="reference")
    assert abs(result.loss / other.loss.cpu() - 1) <= TOL
    for ours, theirs in zip(result[2:4], other[2:4], strict=True):
        assert abs(ours / theirs.cpu() - 1) <= 1e-5
