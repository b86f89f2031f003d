"""The drop-in class against recordings of the authors' class, and where it is meant to differ."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.authors import AuthorsOptions, authors_fasterprune, authors_gram
from tailor_fast.integrations.sparsegpt import SparseGPT, TrainingSparseGPT
from tailor_fast.ops import backends
from tailor_fast.testing import assert_within
from tests.ops.decorate.test_official import CASES, Recorded, check_parity, read

BACKENDS = [name for name, why in backends()["decorate"]["cpu"].items() if why is None]
Made = tuple[SparseGPT, nn.Linear, nn.Linear]


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


@pytest.fixture
def toy() -> Callable[..., Made]:
    """A layer with correlated inputs, fed in three batches of both shapes."""

    def make(rows: int = 24, cols: int = 160, **options: object) -> Made:
        base = linear(torch.randn(rows, cols))
        tuned = linear(base.weight.detach() + 0.1 * torch.randn(rows, cols))
        gpt = SparseGPT(tuned, base, **options)
        for batch in inputs(cols):
            gpt.add_batch(batch, torch.empty(0))
        return gpt, tuned, base

    return make


def inputs(cols: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    mix = torch.randn(cols, cols) / cols**0.5
    return [torch.randn(*shape, cols) @ mix for shape in ((70,), (2, 40), (3, 20))]


def sequences(batches: list[torch.Tensor]) -> int:
    return sum(1 if x.dim() == 2 else x.shape[0] for x in batches)


def mean_gram(batches: list[torch.Tensor]) -> torch.Tensor:
    """The authors' H in float64."""
    flat = torch.cat([x.double().reshape(-1, x.shape[-1]) for x in batches])
    return flat.T @ flat * (2.0 / sequences(batches))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(
    case: str, backend: str, golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read(golden_dir / f"{case}.safetensors")
    kind = TrainingSparseGPT if case.startswith("train") else SparseGPT
    check_run(run, kind, backend, capsys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shipped_vectors(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((Path(__file__).parents[1] / "data").glob("*.safetensors")):
        kind = TrainingSparseGPT if path.stem.startswith("train") else SparseGPT
        check_run(read(path), kind, backend, capsys)


def check_run(
    run: Recorded, kind: type[SparseGPT], backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, pretrained = linear(run.tuned), linear(run.base)
    parameter, before = layer.weight, pretrained.weight.detach().clone()
    gpt = kind(layer, pretrained, backend=backend)
    for batch in run.batches():
        gpt.add_batch(batch, torch.empty(0))
    assert_within(gpt.H, mean_gram(run.batches()), run.gram)
    assert gpt.nsamples == sequences(run.batches())
    gpt.H = run.gram.clone()  # the recorded masks rest on its last bits
    capsys.readouterr()
    o = run.options
    options = (o.sparsity, o.prunen, o.prunem, o.blocksize, o.percdamp, o.tops_mask)
    result = gpt.fasterprune(*options, use_tops=o.tops_mask is not None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("time ")
    assert float(lines[0].removeprefix("time ")) >= 0
    check_parity(run, layer.weight.detach(), float(lines[1].removeprefix("error ")))
    assert layer.weight is parameter
    assert torch.equal(pretrained.weight, before)
    if kind is TrainingSparseGPT:
        assert result is None
        return
    assert result is not None
    for got, name in zip(result, ("delta_sf", "delta_fp", "delta_sp", "mask"), strict=True):
        expected = run.tensors[f"out.{name}"]
        assert got.dtype == expected.dtype
        if name != "delta_sp":
            assert torch.equal(got, expected), name
    assert torch.equal(result.delta_sp, layer.weight.float() - run.base.float())


def test_the_gram_grows_as_the_authors_does(toy: Callable[..., Made]) -> None:
    gpt, *_ = toy()
    expected = authors_gram(inputs(160))
    wide = mean_gram(inputs(160))
    assert gpt.nsamples == 6
    assert_within(gpt.H, wide, expected)
    again, *_ = toy()
    for batch in inputs(160):
        assert again.H is not None  # read in between: nothing changes
        again.add_batch(batch, torch.empty(0))
    assert_within(again.H, wide, expected)


def test_a_gram_that_is_set_counts_as_the_sequences_seen(toy: Callable[..., Made]) -> None:
    gpt, *_ = toy()
    gpt.H = torch.eye(160)
    extra = torch.randn(50, 160)
    gpt.add_batch(extra, torch.empty(0))
    expected, plain = (
        torch.eye(160, dtype=dtype) * 6 / 7 + (2 / 7) * extra.to(dtype).T @ extra.to(dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within(gpt.H, expected, plain)


@pytest.mark.parametrize("mode", ["official", "obs", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_kept_is_the_base(mode: str, dtype: torch.dtype) -> None:
    cols = 160
    base = linear(torch.randn(24, cols, dtype=dtype))
    tuned = linear(base.weight.detach() + 0.1 * torch.randn(24, cols, dtype=dtype))
    before = tuned.weight.detach().clone()
    gpt = SparseGPT(tuned, base, mode=mode)
    for batch in inputs(cols):
        gpt.add_batch(batch.to(dtype), torch.empty(0))
    result = gpt.fasterprune(0.9)
    kept = tuned.weight != base.weight
    assert torch.equal(result.mask.bool(), kept)
    per_block = [int(block.sum()) for block in kept.split(128, dim=1)]
    assert 0 < per_block[0] <= 0.1 * 24 * 128
    assert 0 < per_block[1] <= 0.1 * 24 * 32
    assert not torch.equal(tuned.weight[kept], before[kept])  # decorated


def test_exact_answers_best_and_official_worst(toy: Callable[..., Made]) -> None:
    errors = {}
    for mode in ("official", "obs", "exact"):
        gpt, tuned, _ = toy(rows=64, cols=256, mode=mode)
        answer = tuned.weight.detach().clone()
        gpt.fasterprune(0.8)
        x = torch.cat([batch.reshape(-1, 256) for batch in inputs(256)])
        errors[mode] = (x @ (tuned.weight.detach() - answer).T).square().sum().item()
    assert errors["exact"] < errors["obs"] < errors["official"]


def test_masks_of_the_other_modes(toy: Callable[..., Made]) -> None:
    revert = torch.rand(24, 160) < 0.7
    gpt, tuned, base = toy(mode="exact")
    gpt.fasterprune(0.9, tops_mask=revert, use_tops=True)
    assert torch.equal(tuned.weight == base.weight, revert)
    for cols in (160, 158):
        gpt, tuned, base = toy(cols=cols, mode="obs")
        gpt.fasterprune(0.9, prunen=3, prunem=4)
        kept = (tuned.weight != base.weight)[:, : cols // 4 * 4].reshape(24, -1, 4)
        assert bool((kept.sum(2) == 1).all())
        assert not bool((tuned.weight != base.weight)[:, cols // 4 * 4 :].any())


def test_a_pattern_keeps_the_most_sensitive(toy: Callable[..., Made]) -> None:
    gpt, tuned, base = toy(cols=32, mode="exact")
    hessian = gpt.H.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    delta = (tuned.weight - base.weight).detach().double()
    score = (delta.square() / hessian.inverse().diagonal()).view(24, 8, 4)
    gpt.fasterprune(0.5, prunen=2, prunem=4)
    expected = score >= score.sort(dim=2).values[:, :, 2:3]
    assert torch.equal((tuned.weight != base.weight).view(24, 8, 4), expected)


def test_conv1d_is_the_linear_layer_that_it_is(toy: Callable[..., Made]) -> None:
    gpt, tuned, base = toy(rows=160, cols=160)
    conv, conv_base = Conv1D(160, 160), Conv1D(160, 160)
    conv.weight.data = tuned.weight.detach().T.clone()
    conv_base.weight.data = base.weight.detach().T.clone()
    turned = SparseGPT(conv, conv_base)
    assert (turned.rows, turned.columns) == (160, 160)
    turned.H = gpt.H.clone()
    gpt.fasterprune(0.9)
    turned.fasterprune(0.9)
    assert torch.equal(conv.weight, tuned.weight.T)
    assert conv.weight.is_contiguous()


def test_rows_that_were_not_tuned(
    toy: Callable[..., Made], caplog: pytest.LogCaptureFixture
) -> None:
    """With a tenth of such rows the authors' class keeps everything; the other modes do not."""
    kept = {}
    for mode in ("official", "exact"):
        gpt, tuned, base = toy(mode=mode)
        tuned.weight.data[:5] = base.weight.data[:5]
        with caplog.at_level(logging.WARNING, "tailor_fast"):
            gpt.fasterprune(0.9)
        kept[mode] = (tuned.weight != base.weight).float().mean().item()
    assert kept["official"] > 0.7
    assert 0.09 < kept["exact"] <= 0.1
    assert "10 rows were not tuned within a block" in caplog.text


def test_no_inputs_at_all() -> None:
    """``H`` is then the identity, as in the authors' class."""
    base, tuned = linear(torch.randn(8, 64)), linear(torch.randn(8, 64))
    expected, _ = authors_fasterprune(
        base.weight.detach(), tuned.weight.detach(), torch.zeros(64, 64), AuthorsOptions()
    )
    SparseGPT(tuned, base).fasterprune(0.9)
    assert torch.equal(tuned.weight == base.weight, expected == base.weight)


def test_the_life_of_h(toy: Callable[..., Made]) -> None:
    gpt, *_ = toy()
    gpt.fasterprune(0.9)
    with pytest.raises(AttributeError, match="fasterprune has used it up"):
        gpt.fasterprune(0.9)
    with pytest.raises(ValueError, match="add_batch after H was used up or freed"):
        gpt.add_batch(torch.randn(3, 160), torch.empty(0))
    gpt.free()
    assert gpt.H is None
    with pytest.raises(ValueError, match="fasterprune after free"):
        gpt.fasterprune(0.9)


def test_the_random_numbers_behind_it(toy: Callable[..., Made]) -> None:
    gpt, tuned, base = toy(parity_rng=True)
    weights = tuned.weight.detach().clone(), base.weight.detach().clone()
    torch.manual_seed(5)
    gpt.fasterprune(0.9)
    after = torch.rand(3)
    torch.manual_seed(5)
    authors_fasterprune(weights[1], weights[0], torch.eye(160), AuthorsOptions())
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Conv2d(1, 1, 1), nn.Linear(2, 2)), TypeError, "layer must be a Linear or a Conv1D"),
        ((nn.Linear(2, 2), nn.ReLU()), TypeError, "pretrain_layer must be a Linear or a Conv1D"),
        ((nn.Linear(2, 3), nn.Linear(2, 2)), ValueError, r"like layer, \[3, 2\] .*; got \[2, 2\]"),
    ],
)
def test_layers_that_do_not_fit(
    arguments: tuple[nn.Module, nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SparseGPT(*arguments)


def test_options_that_do_not_fit(toy: Callable[..., Made]) -> None:
    with pytest.raises(ValueError, match="mode must be one of official, obs, exact; got 'best'"):
        toy(mode="best")
    gpt, *_ = toy(mode="exact")
    with pytest.raises(ValueError, match="blocksize must be 128 in mode 'exact'; got 64"):
        gpt.fasterprune(0.9, blocksize=64)
    with pytest.raises(ValueError, match="prunen must be between 0 and prunem; got 4 of 4"):
        gpt.fasterprune(0.9, prunen=4, prunem=4)
    with pytest.raises(ValueError, match=r"inp must be \[tokens, 160\].*; got \[3, 5\]"):
        gpt.add_batch(torch.randn(3, 5), torch.empty(0))
