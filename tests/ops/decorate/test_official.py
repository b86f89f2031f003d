"""``decorate_official`` and the benchmark's baseline against recordings of the authors' class."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from benchmarks.authors import AuthorsOptions, authors_fasterprune, authors_gram
from tailor_fast.ops.decorate import OfficialResult, decorate_official
from tailor_fast.testing import assert_within, tolerance

from .problems import drawn, sweep

DATA = Path(__file__).resolve().parents[2] / "data"
CASES = [
    "eval_2of4",
    "eval_64x256",
    "eval_96x320_ragged_block",
    "eval_blocksize64_sparsity70",
    "eval_dead_columns",
    "eval_tops_mask",
    "eval_width_129",
    "eval_zero_rows_3of64",
    "eval_zero_rows_8of64",
    "train_64x256",
    "train_bf16_64x256",
    "train_fp16_64x256",
]


class Recorded(NamedTuple):
    """One run of the class: what went in, what came out, what it printed."""

    tensors: dict[str, torch.Tensor]
    options: AuthorsOptions
    error: float

    @property
    def base(self) -> torch.Tensor:
        return self.tensors["in.base"]

    @property
    def tuned(self) -> torch.Tensor:
        return self.tensors["in.tuned"]

    @property
    def weight(self) -> torch.Tensor:
        return self.tensors["out.weight"]

    @property
    def gram(self) -> torch.Tensor:
        return self.tensors["out.gram"]

    @property
    def reverted(self) -> torch.Tensor:
        return self.weight == self.base

    def batches(self) -> list[torch.Tensor]:
        return [self.tensors[name] for name in sorted(self.tensors) if name.startswith("in.x.")]

    def decorate(self, **changes: Any) -> OfficialResult:
        o = self.options
        return decorate_official(
            self.base,
            self.tuned,
            self.gram,
            sparsity=o.sparsity,
            score_weights=o.score_weights,
            block_size=o.blocksize,
            percdamp=o.percdamp,
            prunen=o.prunen,
            prunem=o.prunem,
            tops_mask=o.tops_mask,
            **changes,
        )


def read(path: Path) -> Recorded:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    kwargs = json.loads(metadata["kwargs"])
    kwargs.pop("use_tops", None)
    weights = (0.8, 0.2) if metadata["class"] == "llava/train/sparsegpt.py" else (0.5, 0.5)
    options = AuthorsOptions(**kwargs, tops_mask=tensors.get("in.tops_mask"), score_weights=weights)
    printed = json.loads(metadata["printed"])
    return Recorded(tensors, options, float(printed[0].removeprefix("error ")))


@pytest.fixture(params=sorted(path.stem for path in DATA.glob("*.safetensors")))
def shipped(request: pytest.FixtureRequest) -> Recorded:
    return read(DATA / f"{request.param}.safetensors")


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> Recorded:
    return read(golden_dir / f"{request.param}.safetensors")


def check_parity(run: Recorded, weight: torch.Tensor, error: float) -> None:
    """Same weights reverted, bit for bit; the rest as close to float64 as the class itself."""
    assert weight.dtype == run.weight.dtype
    assert torch.equal(weight == run.base, run.reverted)
    if "out.mask" in run.tensors:
        assert torch.equal(weight != run.base, run.tensors["out.mask"].bool())
    hessian = run.gram.double()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += run.options.percdamp * diagonal.mean()
    check_sweep(weight, error, run.tuned, run.base, hessian, run.weight)
    assert abs(run.error - error) <= 2 * loss_limit(run.tuned, run.base, run.reverted, hessian)


def check_sweep(
    weight: torch.Tensor,
    error: float,
    tuned: torch.Tensor,
    base: torch.Tensor,
    hessian: torch.Tensor,
    plain: torch.Tensor,
) -> None:
    """Weight and loss against the float64 sweep over single columns, on the mask of ``plain``."""
    revert = plain == base
    expected, losses = sweep(tuned, base, revert, hessian, sign=1)
    assert_within(weight, expected, plain, plain.dtype)
    assert abs(error - losses.sum().item() / 2) <= loss_limit(tuned, base, revert, hessian)


def loss_limit(
    tuned: torch.Tensor, base: torch.Tensor, revert: torch.Tensor, hessian: torch.Tensor
) -> float:
    """The rule for a column's loss, as often as there are columns: one sum may be right by luck."""
    exact, plain = (
        sweep(tuned, base, revert, hessian.to(dtype), sign=1)[1] / 2
        for dtype in (torch.float64, torch.float32)
    )
    return len(exact) * tolerance(exact, plain, torch.float32)


def test_the_shipped_recordings_are_there(shipped: Recorded) -> None:
    assert len(list(DATA.glob("*.safetensors"))) == 3
    check_parity(shipped, shipped.weight, shipped.error)  # the recording fits its own equations


def test_parity_with_the_shipped_recordings(shipped: Recorded) -> None:
    result = shipped.decorate()
    check_parity(shipped, result.weight, result.loss.item())


@pytest.mark.golden
def test_parity_with_every_recording(golden: Recorded) -> None:
    result = golden.decorate()
    check_parity(golden, result.weight, result.loss.item())
    # What the mask keeps and the class does not count was equal to base before and after.
    uncounted = result.mask & golden.reverted
    assert torch.equal(~result.mask, golden.reverted & ~uncounted)
    assert torch.equal(golden.weight[uncounted], golden.base[uncounted])


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_the_baseline_matches_every_recording(golden: Recorded) -> None:
    weight, error = authors_fasterprune(golden.base, golden.tuned, golden.gram, golden.options)
    check_parity(golden, weight, error)
    x = [batch.reshape(-1, batch.shape[-1]).double() for batch in golden.batches()]
    sequences = sum(1 if batch.dim() == 2 else len(batch) for batch in golden.batches())
    expected = torch.cat(x).T @ torch.cat(x) * (2 / sequences)
    assert_within(authors_gram(golden.batches()), expected, golden.gram)


@pytest.mark.golden
def test_every_recording_is_tested(golden_dir: Path) -> None:
    assert sorted(path.stem for path in golden_dir.glob("*.safetensors")) == CASES


def layer(rows: int, cols: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = drawn(rows, cols, 3 * cols, 0.0, 0.5, seed)
    base = 0.02 * torch.randn(rows, cols)
    return base, base + problem.delta, problem.gram


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.0},
        {"sparsity": 0.5, "score_weights": (1.0, 0.0), "block_size": 50},
        {"block_size": 1000, "percdamp": 0.3},
        {"prunen": 3, "prunem": 4, "block_size": 32},
        {"prunen": 1, "prunem": 5, "block_size": 64},
    ],
)
def test_agrees_with_the_baseline(options: dict[str, Any]) -> None:
    base, tuned, gram = layer(24, 200)
    gram[7], gram[:, 7] = 0.0, 0.0
    options = {"sparsity": 0.9, **options}
    names = {"blocksize" if name == "block_size" else name: v for name, v in options.items()}
    weight, error = authors_fasterprune(base, tuned, gram, AuthorsOptions(**names))
    result = decorate_official(base, tuned, gram, **options)
    hessian = gram.double()
    hessian[7, 7] = 1
    hessian.diagonal().add_(options.get("percdamp", 0.01) * hessian.diagonal().mean())
    assert torch.equal(result.mask, weight != base)
    check_sweep(result.weight, result.loss.item(), tuned, base, hessian, weight)
    revert = weight == base
    assert abs(error - result.loss.item()) <= 2 * loss_limit(tuned, base, revert, hessian)


def test_untuned_rows_break_the_budget_as_in_the_authors_code(caplog) -> None:
    base, tuned, gram = layer(40, 96)
    tuned[:5] = base[:5]  # more than a tenth: the threshold itself is then NaN
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        result = decorate_official(base, tuned, gram, sparsity=0.9)
    assert bool(result.mask.all())
    assert torch.equal(result.weight, tuned)
    assert result.loss.item() == 0.0
    assert "decorate_official: 480 scores are not a number" in caplog.text


def test_guarded_scores_keep_the_budget(caplog) -> None:
    base, tuned, gram = layer(40, 129)
    tuned[:5] = base[:5]
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        result = decorate_official(base, tuned, gram, sparsity=0.9, reproduce_nan=False)
    assert not caplog.text
    assert int(result.mask[:, :128].sum()) == 40 * 128 - int(40 * 128 * 0.9) - 1
    assert not result.mask[:, 128].any()  # one column: every score is 0, none is above another
    assert bool(result.mask[5:].any())


def test_tops_mask_is_taken_as_it_is() -> None:
    base, tuned, gram = layer(16, 150)
    tops = torch.rand(16, 150) < 0.7
    result = decorate_official(base, tuned, gram, sparsity=0.9, tops_mask=tops)
    assert torch.equal(result.mask, ~tops)
    assert torch.equal(result.weight[tops], base[tops])


def test_no_factor_is_an_error_as_in_the_authors_code() -> None:
    base, tuned, _ = layer(4, 2)
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        decorate_official(base, tuned, gram, sparsity=0.5)
    message = str(caught.value)
    assert message.startswith(
        "decorate_official: gram must be positive definite at percdamp 0.01; got "
    )
    assert message.endswith("Hint: a larger percdamp, or decorate_exact")


def test_inputs_are_unchanged() -> None:
    base, tuned, gram = layer(1, 40)
    before = [tensor.clone() for tensor in (base, tuned, gram)]
    decorate_official(base, tuned, gram, sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, tuned, gram), strict=True))
