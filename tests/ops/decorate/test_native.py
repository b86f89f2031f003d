"""What the C++ backend of ``decorate`` promises beyond what every backend does."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.decorate import Decorated, decorate_exact, decorate_obs, decorate_official
from tailor_fast.ops.decorate.api import TOL
from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.testing import assert_within
from tests.backends import KERNELS, needs_native, on_kernels

from .problems import Problem, bare, correlated, damped, drawn, objective, optimum
from .problems import sweep as swept

pytestmark = needs_native
native = pytest.importorskip("tailor_fast.ops.decorate.native")
exact = pytest.importorskip("tailor_fast.ops.decorate.native.exact")
official = pytest.importorskip("tailor_fast.ops.decorate.native.official")
root = pytest.importorskip("tailor_fast.ops.decorate.native.root")
roots = pytest.importorskip("tailor_fast.ops.roots")
sweep = pytest.importorskip("tailor_fast.ops.decorate.native.sweep")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True, params=KERNELS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """These tests name their backend; they run once per set of kernels."""
    yield from on_kernels(request.param)


def solve(problem: Problem, rhs: torch.Tensor | None = None, **options: float) -> Decorated:
    return decorate_exact(*problem, rhs, backend="native", **options)


def skewed(rows: int, cols: int, density: float, seed: int) -> Problem:
    """Rows of very different size under one mask: some keep nothing, some nearly everything."""
    problem = correlated(rows, cols, density, seed)
    generator = torch.Generator().manual_seed(seed)
    delta = problem.delta * (2 * torch.randn(rows, 1, generator=generator)).exp()
    kept = int(density * delta.numel())
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().argsort(descending=True)[:kept]] = True
    return problem._replace(delta=delta, mask=mask.reshape(rows, cols))


def check_minimum(problem: Problem, patch: torch.Tensor, percdamp: float) -> None:
    """Each row within the tolerance of its own minimum, and never worse than the bare mask."""
    damping = problem.damping(percdamp)
    best = optimum(problem, damping)
    assert not patch[~problem.mask].any()
    for row in range(len(patch)):
        one = Problem(problem.delta[row : row + 1], problem.mask[row : row + 1], problem.gram)
        part = slice(row, row + 1)
        reverted = objective(one, torch.zeros_like(one.delta), damping)
        rounding = EPS**2 * reverted / percdamp
        loss = objective(one, patch[part], damping)
        assert loss <= objective(one, best[part], damping) * (1 + TOL) + rounding
        assert loss <= objective(one, bare(one), damping) + rounding


@settings(max_examples=40)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 150),
    density=st.sampled_from([0.01, 0.1, 0.4]),
    percdamp=st.sampled_from([1e-3, 1e-2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_ragged_and_skewed_rows(
    rows: int, cols: int, density: float, percdamp: float, seed: int
) -> None:
    problem = skewed(rows, cols, density, seed)
    result = solve(problem, percdamp=percdamp)
    check_minimum(problem, result.patch, percdamp)


@pytest.mark.parametrize("right_side", [False, True])
def test_rows_that_keep_much_go_another_way(monkeypatch, right_side: bool) -> None:
    problem = skewed(48, 96, 0.2, 11)
    counts = problem.mask.sum(1)
    rhs = 1.1 * problem.delta @ problem.gram if right_side else None
    options = {"tol": 1e-10, "target_energy": 3.0 if right_side else None}
    gathered = solve(problem, rhs, **options)
    monkeypatch.setattr(exact, "SMALL", 0)
    monkeypatch.setattr(exact, "GATHER_SHARE", 0.25)
    assert 5 < int((counts > 24).sum()) < 43
    mixed = solve(problem, rhs, **options)
    assert not torch.equal(mixed.patch, gathered.patch)
    few = counts <= 24
    assert torch.equal(mixed.patch[few], gathered.patch[few])
    best, plain = (
        optimum(problem, problem.damping(0.01), rhs, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within(mixed.patch, best, plain)
    assert_within(gathered.patch, best, plain)
    for one, other in zip(mixed[1:4], gathered[1:4], strict=True):
        assert abs(one - other) <= 1e-6 * gathered.loss_reverted.abs()


def test_rows_without_proof_are_counted_on_both_ways(monkeypatch, caplog) -> None:
    problem = skewed(48, 96, 0.2, 11)
    monkeypatch.setattr(exact, "SMALL", 0)
    monkeypatch.setattr(exact, "GATHER_SHARE", 0.25)
    solve(problem, max_iterations=1)
    numbers = [
        int(record.getMessage().split()[1]) for record in caplog.records if record.levelno >= 30
    ]
    assert len(numbers) == 2
    assert min(numbers) > 0


def test_same_bits_at_any_number_of_threads(set_num_threads) -> None:
    problem = skewed(150, 130, 0.1, 4)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(solve(problem).patch)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_same_bits_from_run_to_run() -> None:
    problem = skewed(90, 140, 0.1, 5)
    base = torch.randn_like(problem.delta)
    for run in (
        lambda: solve(problem),
        lambda: decorate_obs(*problem, backend="native"),
        lambda: decorate_official(
            base, base + problem.delta, problem.gram, sparsity=0.9, backend="native"
        ),
    ):
        first = run()
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element (of a float, four bytes) past an aligned address."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def test_unaligned_views_give_the_same_bits() -> None:
    problem = skewed(33, 77, 0.2, 6)
    moved = Problem(*map(shifted, problem))
    base = torch.randn_like(problem.delta)
    assert moved.mask.data_ptr() % 2 == 1
    rhs = problem.delta @ problem.gram
    assert torch.equal(solve(problem).patch, solve(moved).patch)
    assert torch.equal(solve(problem, rhs).patch, solve(moved, shifted(rhs)).patch)
    one, other = decorate_obs(*problem, backend="native"), decorate_obs(*moved, backend="native")
    assert torch.equal(one.patch, other.patch)
    one, other = (
        decorate_official(a, b, c, sparsity=0.8, backend="native")
        for a, b, c in (
            (base, base + problem.delta, problem.gram),
            (shifted(base), shifted(base + problem.delta), moved.gram),
        )
    )
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 17, 63, 64, 65, 128, 129])
def test_every_length_of_the_packed_matrix(kept: int) -> None:
    problem = correlated(3, 129)
    problem.mask[:] = False
    for row in range(3):
        problem.mask[row, torch.randperm(129)[:kept]] = True
    result = solve(problem, tol=1e-10)
    best, plain = (
        optimum(problem, problem.damping(0.01), dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within(result.patch, best, plain)


def test_strips_and_groups() -> None:
    """More columns than one strip, more rows than one group, kept weights on all edges."""
    problem = correlated(300, 1100, 0.02)
    problem.mask[:, [0, 511, 512, 1023, 1024, 1099]] = True
    problem.mask[[7, 130, 299]] = False
    result = solve(problem, tol=1e-12)
    rows = [0, 7, 127, 128, 129, 255, 299]
    part = Problem(problem.delta[rows], problem.mask[rows], problem.gram)
    best, plain = (
        optimum(part, part.damping(0.01), dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_within(result.patch[rows], best, plain)


@pytest.mark.parametrize("mode", [decorate_exact, decorate_obs])
def test_losses_in_float32_are_those_in_float64(monkeypatch, mode) -> None:
    problem = correlated(120, 320)
    wide = mode(*problem, backend="native")
    for module in (exact, sweep):
        monkeypatch.setattr(module, "FLOAT32_FROM", 0)
    narrow = mode(*problem, backend="native")
    assert torch.equal(wide.patch, narrow.patch)
    for one, other in zip(wide[1:4], narrow[1:4], strict=True):
        assert abs(one / other - 1) < 1e-6


def test_panels_of_the_sweep(monkeypatch) -> None:
    problem = correlated(20, 700)
    best, _ = swept(
        problem.delta,
        torch.zeros_like(problem.delta),
        ~problem.mask,
        damped(problem.gram, problem.damping(0.01)),
        sign=-1,
    )
    plain = decorate_obs(*problem, backend="reference").patch
    assert_within(decorate_obs(*problem, backend="native").patch, best, plain)
    for module in (root, roots):
        monkeypatch.setattr(module, "PANEL", roots.BLOCK)
    assert_within(decorate_obs(*problem, backend="native").patch, best, plain)


@pytest.mark.parametrize("cols", [1, 15, 63, 64, 65, 200])
def test_objectives_from_the_errors_of_a_sweep(monkeypatch, cols: int) -> None:
    """Every width of the last strip; rows that keep nothing and rows that keep all."""
    problem = correlated(12, cols, 0.3)
    problem.mask[3], problem.mask[7] = False, True
    wide = decorate_obs(*problem, backend="native")
    monkeypatch.setattr(sweep, "FLOAT32_FROM", 0)
    narrow = decorate_obs(*problem, backend="native")
    assert torch.equal(narrow.patch, wide.patch)
    for one, other in zip(narrow[1:4], wide[1:4], strict=True):
        assert abs(one - other) < 1e-6 * wide.loss_reverted


def test_the_proof_holds_where_iterations_end_by_quadrature() -> None:
    problem = correlated(40, 200, 0.3)
    damping = problem.damping(0.01)
    best = optimum(problem, damping)
    for tol in (0.3, 1e-2, 1e-3, 1e-5, 1e-7):
        patch = solve(problem, tol=tol).patch
        for row in range(40):
            part = slice(row, row + 1)
            one = Problem(problem.delta[part], problem.mask[part], problem.gram)
            excess = objective(one, patch[part], damping) / objective(one, best[part], damping) - 1
            assert excess <= tol
    # The reference ends by |r|^2 / λ alone.
    plain = decorate_exact(*problem, backend="reference")
    assert int(solve(problem).iterations) < 0.9 * int(plain.iterations)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.97])
def test_rows_of_any_density_are_gathered_alike(density: float) -> None:
    """From an eighth of the columns on whole vectors are packed, with a rest behind them."""
    for cols in (17, 64, 150):
        problem = drawn(9, cols, 2 * cols, density, 0.0, cols)
        best, plain = (
            optimum(problem, problem.damping(0.1), dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        assert_within(solve(problem, percdamp=0.1, tol=1e-12).patch, best, plain)


@pytest.mark.parametrize("width", [1, 2, 3, 17, 128])
@pytest.mark.parametrize("reproduce_nan", [False, True])
def test_scores_of_a_block(width: int, reproduce_nan: bool) -> None:
    """Their values: a mask tells their order alone. The last row's salience has no spread."""
    rows = 37
    working, salience = torch.randn(rows, width), torch.rand(rows, width)
    salience[-1] = 0
    factor = torch.eye(width) * (0.5 + torch.rand(width))
    options = OfficialOptions(0.9, (0.3, 0.7), 128, 0.01, 0, 0, reproduce_nan)
    ours = official._score(working, salience, sweep.Block.build(factor, sign=1), options)

    def scores(dtype: torch.dtype) -> torch.Tensor:
        squares = (working.to(dtype) / factor.diagonal().to(dtype)).square()
        total = torch.zeros(rows, width, dtype=dtype)
        for part, weight in zip((salience.to(dtype), squares), (0.3, 0.7), strict=True):
            far = part - part.mean(1, keepdim=True)
            z = far / (far.square().sum(1, keepdim=True) / (width - 1)).sqrt()
            total += weight * (z if reproduce_nan else z.nan_to_num(0.0))
        return total

    best, plain = scores(torch.float64), scores(torch.float32)
    missing = best.isnan()
    assert missing.all(1).tolist() == [reproduce_nan and width == 1] * 36 + [reproduce_nan]
    assert torch.equal(ours.isnan(), missing)
    assert_within(ours[~missing], best[~missing], plain[~missing])


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for the instruction set sse9"):
        exact._C.use_instruction_set("sse9")


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    """It would end the process if it left the parallel region. Nothing behind 0 is touched."""
    rows, width = 64, 2**61  # more scratch than any vector holds, for each of two chunks of rows
    with pytest.raises(ValueError, match="larger than max_size"):
        exact._C.decorate_sweep(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, rows, width, 0, 0, 2)


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_cannot_be_had_reaches_the_caller(threads: int) -> None:
    """As MemoryError, out of each of two threads at once; the next call works."""
    rows, width = 64, 2**57  # 2 EiB of scratch: within a vector's limit, beyond any address space
    with pytest.raises(MemoryError):
        exact._C.decorate_sweep(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, rows, width, 0, 0, threads)
    problem = correlated(70, 40)
    check_minimum(problem, solve(problem).patch, 0.01)
