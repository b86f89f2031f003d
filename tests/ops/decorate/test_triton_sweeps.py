"""The sweeps of the Triton backend, and what it shares with the others: schemas, in-place forms."""

import logging
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

from benchmarks.authors import AuthorsOptions, authors_fasterprune
from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.decorate import (
    Decorated,
    OfficialResult,
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    decorate_official_,
    factor_obs,
)
from tailor_fast.testing import assert_within

from .problems import Problem, bare, correlated, damped, drawn, objective
from .test_in_place import check as check_words
from .test_in_place import layer as words_of_a_layer
from .test_in_place import words
from .test_obs import check_patch
from .test_official import DATA, Recorded, check_parity, check_sweep, layer, loss_limit, read
from .test_schema import samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_unavailable("triton", DEVICE) is not None, reason=str(why_unavailable("triton", DEVICE))
)
package = pytest.importorskip("tailor_fast.ops.decorate.triton")
sweeps = pytest.importorskip("tailor_fast.ops.decorate.triton.sweep")
systems = pytest.importorskip("tailor_fast.ops.decorate.triton.system")

OPS = torch.ops.tailor_fast
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    """Once is enough: these tests name their backend."""


def here(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def obs(problem: Problem, **options: object) -> Decorated:
    result = decorate_obs(*here(*problem), backend="triton", **options)
    return Decorated(*(value.cpu() for value in result))


def official(base, tuned, gram, tops_mask=None, **options) -> OfficialResult:
    if tops_mask is not None:
        tops_mask = tops_mask.to(DEVICE)
    tensors = here(base, tuned, gram)
    result = decorate_official(*tensors, tops_mask=tops_mask, backend="triton", **options)
    return OfficialResult(*(value.cpu() for value in result))


@pytest.mark.parametrize("panel", [128, sweeps.PANEL])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 127), (5, 128), (6, 129), (9, 300)])
def test_obs_is_the_sweep_over_single_columns(
    monkeypatch, shape: tuple[int, int], panel: int
) -> None:
    monkeypatch.setattr(sweeps, "PANEL", panel)
    monkeypatch.setattr(package, "TILE", 5 * 300)
    problem = drawn(*shape, tokens=2 * shape[1], density=0.3, decades=1.0, seed=1)
    result = check_patch(problem, 0.01, obs(problem))
    damping = problem.damping(0.01)
    hessian = damped(problem.gram, damping)
    nothing = torch.zeros_like(problem.delta)
    for reported, patch in zip(result[1:4], (result.patch, bare(problem), nothing), strict=True):
        error = problem.delta - patch
        single = ((error @ hessian.float()) * error).sum().reshape(1)
        expected = torch.tensor([objective(problem, patch, damping)], dtype=torch.float64)
        assert_within(reported.reshape(1), expected, single)


def test_obs_losses_of_a_large_problem(monkeypatch) -> None:
    problem = correlated(12, 140, 0.2)
    small = obs(problem)
    monkeypatch.setattr(systems, "FLOAT16_FROM", 0)
    large = obs(problem)
    assert torch.equal(small.patch, large.patch)
    for one, other in zip(small[1:4], large[1:4], strict=True):
        assert abs(one / other - 1) <= 1e-4  # 12 rows; rounding averages out over thousands


def test_obs_full_and_empty_rows_and_unseen_inputs() -> None:
    problem = drawn(6, 140, 300, 0.4, 1.0, 2)
    problem.mask[0], problem.mask[5] = True, False
    result = check_patch(problem, 0.01, obs(problem))
    assert torch.equal(result.patch[0], problem.delta[0])
    unseen = obs(problem._replace(gram=torch.zeros(140, 140)))
    assert torch.equal(unseen.patch, bare(problem))
    assert [value.item() for value in unseen[1:4]] == [0.0, 0.0, 0.0]
    for shape in ((0, 5), (3, 0)):
        mask = torch.zeros(shape, dtype=torch.bool)
        nothing = obs(Problem(torch.zeros(shape), mask, torch.eye(shape[1])))
        assert nothing.patch.shape == shape
        assert nothing.loss.item() == 0.0


def test_obs_climbs_the_same_ladder(caplog) -> None:
    """All inputs equal: the second pivot is exactly zero in every precision."""
    problem = Problem(torch.randn(3, 12), torch.rand(3, 12) < 0.5, torch.ones(12, 12))
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        check_patch(problem, 0.001, obs(problem, percdamp=0.0))
    assert [record.getMessage() for record in caplog.records] == [
        "decorate_obs: no Cholesky factor in torch.float32 at percdamp 0",
        "decorate_obs: no Cholesky factor in torch.float64 at percdamp 0",
        "decorate_obs: factorised in torch.float64 at percdamp 0.001",
    ]
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="decorate_obs: gram must be positive definite"):
        obs(Problem(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), gram))


@pytest.mark.parametrize(("first", "last"), [(0, None), (4, 8), (120, 140), (150, 150)])
def test_a_part_of_a_block(first: int, last: int | None) -> None:
    """Against the same columns one by one; the tensors are windows of larger ones."""
    rows, width = 7, 150
    memory = torch.randn(4, rows, width + 9)
    weight, target, errors = (part[:, 3 : 3 + width] for part in memory[:3])
    keep = (torch.rand(rows, width + 5) < 0.3)[:, 2 : 2 + width]
    factor = (torch.randn(width, width) / 20).triu(1) + torch.diag(0.5 + torch.rand(width))
    expected, lost = weight.double(), errors.double()
    for column in range(first, width if last is None else last):
        dropped = torch.where(keep[:, column], 0, expected[:, column] - target[:, column])
        lost[:, column] = dropped / factor[column, column]
        expected += torch.outer(lost[:, column], factor.triu(1)[column])
    window = slice(3, 3 + width)
    moved, kept, upper = here(memory, keep, factor)
    before = moved.clone()
    sweeps.sweep_block(
        moved[0][:, window], moved[1][:, window], kept, upper, moved[2][:, window], first, last
    )
    scale = expected.abs().max()
    assert (moved[0][:, window].cpu() - expected).abs().max() <= 1e-5 * scale
    assert (moved[2][:, window].cpu() - lost).abs().max() <= 1e-5 * scale
    before[0][:, window], before[2][:, window] = moved[0][:, window], moved[2][:, window]
    assert torch.equal(before, moved)


def run(recorded: Recorded) -> OfficialResult:
    o = recorded.options
    return official(
        recorded.base,
        recorded.tuned,
        recorded.gram,
        o.tops_mask,
        sparsity=o.sparsity,
        score_weights=o.score_weights,
        block_size=o.blocksize,
        percdamp=o.percdamp,
        prunen=o.prunen,
        prunem=o.prunem,
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.safetensors")))
def test_official_parity_with_the_shipped_recordings(name: str) -> None:
    recorded = read(DATA / f"{name}.safetensors")
    result = run(recorded)
    check_parity(recorded, result.weight, result.loss.item())


@pytest.mark.golden
@pytest.mark.parametrize("name", ["eval_tops_mask", "eval_zero_rows_8of64"])
def test_official_parity_with_recordings(name: str, golden_dir: Path) -> None:
    recorded = read(golden_dir / f"{name}.safetensors")
    result = run(recorded)
    check_parity(recorded, result.weight, result.loss.item())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 1000, "percdamp": 0.3},
        {"sparsity": 0.5, "score_weights": (1.0, 0.0), "block_size": 50},
        {"prunen": 3, "prunem": 4, "block_size": 32},
    ],
)
def test_official_agrees_with_the_baseline(options) -> None:
    base, tuned, gram = layer(8, 200)
    gram[7], gram[:, 7] = 0.0, 0.0
    options = {"sparsity": 0.9, **options}
    names = {"blocksize" if name == "block_size" else name: v for name, v in options.items()}
    weight, error = authors_fasterprune(base, tuned, gram, AuthorsOptions(**names))
    result = official(base, tuned, gram, **options)
    hessian = gram.double()
    hessian[7, 7] = 1
    hessian.diagonal().add_(options.get("percdamp", 0.01) * hessian.diagonal().mean())
    assert torch.equal(result.mask, weight != base)
    check_sweep(result.weight, result.loss.item(), tuned, base, hessian, weight)
    assert abs(error - result.loss.item()) <= 2 * loss_limit(tuned, base, weight == base, hessian)


def test_official_nan_as_in_the_authors_code(caplog) -> None:
    base, tuned, gram = layer(40, 129)
    tuned[:5] = base[:5]  # more than a tenth: the threshold itself is then NaN
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        result = official(base, tuned, gram, sparsity=0.9)
    assert bool(result.mask.all())
    assert torch.equal(result.weight, tuned)
    assert "decorate_official: 680 scores are not a number" in caplog.text
    guarded = official(base, tuned, gram, sparsity=0.9, reproduce_nan=False)
    assert int(guarded.mask[:, :128].sum()) == 40 * 128 - int(40 * 128 * 0.9) - 1
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(torch.linalg.LinAlgError, match="decorate_official: gram must be positive"):
        official(*(part[:, :2].contiguous() for part in (base, tuned)), gram, sparsity=0.5)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 40), (5, 60)])
def test_in_place_forms(monkeypatch, shape: tuple[int, int], dtype: torch.dtype) -> None:
    monkeypatch.setattr(package, "TILE", 3 * 60)
    weight, base, mask, gram = here(*words_of_a_layer(shape, dtype))
    before, delta = base.clone(), weight.float() - base.float()
    rhs = 1.1 * delta @ gram
    for functional, in_place, extra in [
        (decorate_exact, decorate_exact_, {}),
        (decorate_exact, decorate_exact_, {"rhs": rhs, "target_energy": 2.0}),
        (decorate_obs, decorate_obs_, {}),
    ]:
        options = {"percdamp": 0.05, "backend": "triton", **extra}
        expected, changed = functional(delta, mask, gram, **options), weight.clone()
        losses = in_place(changed, base, mask, gram, **options)
        check_words(changed, base, mask, expected.patch, before)
        assert all(torch.equal(a, b) for a, b in zip(expected[1:], losses, strict=True))
    options = {"sparsity": 0.8, "backend": "triton"}
    expected = decorate_official(base, weight, gram, **options)
    result = decorate_official_(weight, base, gram, **options)
    assert torch.equal(words(weight), words(expected.weight))
    assert torch.equal(words(weight)[~result.mask], words(base)[~result.mask])
    assert torch.equal(result.loss, expected.loss)


def test_same_bits_from_run_to_run() -> None:
    problem, base = correlated(9, 140, 0.2), torch.randn(9, 140)
    for one in (
        lambda: obs(problem),
        lambda: official(base, base + problem.delta, problem.gram, sparsity=0.9),
    ):
        first = one()
        assert all(torch.equal(a, b) for a, b in zip(first, one(), strict=True))


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str) -> None:
    *arguments, _ = samples()[name]
    given = tree_map_only(torch.Tensor, lambda part: part.to(DEVICE), arguments)
    torch.library.opcheck(getattr(OPS, name).default, (*given, "triton"))


@pytest.mark.gpu
def test_obs_at_size() -> None:
    problem = correlated(700, 1536)
    result = obs(problem)
    other = decorate_obs(*here(*problem), backend="reference")
    scale = other.patch.abs().max().item()
    assert (result.patch - other.patch.cpu()).abs().max() <= 1e-4 * scale
    for ours, theirs in zip(result[1:4], other[1:4], strict=True):
        assert abs(ours / theirs.cpu() - 1) <= 1e-5


def test_one_factor_serves_all_layers_of_a_gram() -> None:
    """The same bits as without it."""
    problem = drawn(5, 150, 400, 0.3, 1.0, 21)
    layer = [part.to(DEVICE) for part in problem]
    factor = factor_obs(layer[2], backend="triton")
    assert factor.backend == "triton"
    for scale in (1.0, -3.0):
        delta = layer[0] * scale
        alone = decorate_obs(delta, *layer[1:], backend="triton")
        shared = decorate_obs(delta, *layer[1:], factor=factor)
        assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
