"""Patching without data, disk to disk: the words of ``tailor_model``, read once, in any ring."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tailor_fast._core.errors import UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import Checkpoint
from tailor_fast.patching import memory
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.solving import keep_, write_patch
from tailor_fast.patching.tailor import tailor_model
from tests.models.processors import WORDS, text_tokenizer
from tests.patching.disk import llama, llama_pair, moved, save_pair
from tests.patching.test_checkpoints import words

OPTIONS = RunOptions(max_shard_bytes=200_000)


@pytest.fixture
def small_ring(monkeypatch: Any) -> None:
    """A ring that holds no layer of the pairs below."""
    monkeypatch.setattr(memory, "RING_BYTES", 16 << 10)
    monkeypatch.setattr(memory, "LEAST_RING_BYTES", 16 << 10)
    monkeypatch.setattr(memory, "COPY_BYTES", 4 << 10)
    monkeypatch.setattr(memory, "_PARTS", 2)


def gpt2_pair(folder: Path) -> tuple[Path, Path]:
    """A pair whose linear layers are stored ``[in, out]``."""
    torch.manual_seed(6)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=16, dtype=torch.float16
    )
    base = GPT2LMHeadModel(config).half().eval()
    return save_pair(folder, base, moved(base), text_tokenizer(), shard="60KB")


def check_against_memory(base: Path, tuned: Path, out: Path, recipe: Recipe) -> None:
    """Patch on disk and in memory; the same words and the same counts."""
    report = patch_checkpoint(base, tuned, out, recipe, options=OPTIONS)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (base, tuned)]
    expected = tailor_model(*models, None, recipe)
    written, state = words(out), expected.model.state_dict()
    assert set(written) == set(words(base))
    for name, tensor in written.items():
        key = name if name in state else f"transformer.{name}"
        assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8)), name
    assert [(row.name, row.kept, row.rows, row.cols, row.group) for row in report.linears] == [
        (row.name, row.kept, row.rows, row.cols, row.group) for row in expected.report.linears
    ]
    assert report.kept > 0
    assert not set(expected.report.notes) - set(report.notes)


SCOPES = ("tensor", "row", "block", "layer", "global")


@pytest.mark.parametrize("normalize", ["row_block", "tensor"])
@pytest.mark.parametrize("scope", SCOPES)
def test_whole_layers_get_the_words_of_the_model_in_memory(
    scope: Any, normalize: Any, tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2, dtype=torch.bfloat16)
    recipe = Recipe(scope=scope, normalize=normalize, density=0.2)
    check_against_memory(base, tuned, tmp_path / "out", recipe)


@pytest.mark.usefixtures("small_ring")
@pytest.mark.parametrize("normalize", ["row_block", "tensor", "row", "none"])
@pytest.mark.parametrize("scope", SCOPES)
def test_layers_that_stream_through_the_ring_get_the_same_words(
    scope: Any, normalize: Any, tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2, width=64)
    recipe = Recipe(scope=scope, normalize=normalize, density=0.07, untouched="tuned")
    check_against_memory(base, tuned, tmp_path / "out", recipe)


@pytest.mark.usefixtures("small_ring")
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_equal_scores_are_kept_in_order_across_the_parts(scope: Any, tmp_path: Path) -> None:
    base = llama(blocks=1, width=64)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for before, after in zip(base.parameters(), tuned.parameters(), strict=True):
            before.copy_((8 * before).round() / 8)
            step = torch.randint(-1, 2, before.shape, generator=generator)
            after.copy_(before + step / 8)
    paths = save_pair(tmp_path, base, tuned, text_tokenizer())
    check_against_memory(*paths, tmp_path / "out", Recipe(scope=scope, normalize="none"))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_layers_stored_the_other_way_round(scope: Any, tmp_path: Path) -> None:
    base, tuned = gpt2_pair(tmp_path)
    check_against_memory(base, tuned, tmp_path / "out", Recipe(scope=scope))


@pytest.fixture
def read(monkeypatch: Any) -> Counter[tuple[str, str]]:
    """Bytes read of each tensor of ``base`` and ``tuned``."""
    counts: Counter[tuple[str, str]] = Counter()
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, name: str, *args: Any) -> int:
        count = read_into(self, name, *args)
        counts[self.path.name, name] += count
        return count

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    return counts


@pytest.mark.parametrize("scope", ["tensor", "row", "block"])
def test_every_input_byte_is_read_once(
    scope: Any, read: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path)
    sizes = {name: tensor.nbytes for name, tensor in words(base).items()}
    patch_checkpoint(base, tuned, tmp_path / "out", Recipe(scope=scope), options=OPTIONS)
    assert read == {
        (side, name): size for side in ("base", "tuned") for name, size in sizes.items()
    }


@pytest.mark.usefixtures("small_ring")
def test_a_layer_larger_than_the_ring_is_read_twice_and_a_copy_once(
    read: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path, blocks=1, width=64)
    sizes = {name: tensor.nbytes for name, tensor in words(base).items()}
    patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)
    for (_, name), count in read.items():
        # Once to see that the two differ (their first bytes), then for threshold and mask. The
        # search for the threshold of so few weights ends after one round.
        times = 2 if "_proj" in name and 2 * sizes[name] > 16 << 10 else 1
        assert times * sizes[name] <= count <= times * sizes[name] + (64 << 10), name


@pytest.mark.parametrize("ring", ["large", "small"])
def test_equal_layers_stay_as_they_are(ring: str, tmp_path: Path, request: Any) -> None:
    if ring == "small":
        request.getfixturevalue("small_ring")
    base, tuned = llama_pair(tmp_path, blocks=2, width=64)
    before = words(base)
    same = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    for path in tuned.glob("*.safetensors"):
        tensors = load_file(path)
        changed = {name: before[name] for name in same if name in tensors}
        if changed:
            save_file(tensors | changed, path, metadata={"format": "pt"})
    report = patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)
    assert "2 of 14 layers are equal in both: left as is" in report.notes
    assert not {row.tensor for row in report.linears} & set(same)
    after = words(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in same)


@settings(max_examples=40)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 300),
    st.integers(0, 2**32),
)
def test_merging_in_place_is_write_patch(dtype: torch.dtype, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(torch.int16 if dtype.itemsize == 2 else torch.int32)
    raw = torch.randint(info.min, info.max + 1, (2, size, 3), generator=generator)
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    base, tuned = raw.to(word).view(dtype)
    mask = torch.rand(size, 3, generator=generator) < 0.5
    mask &= base.isfinite() & tuned.isfinite()  # select refuses to keep anything else
    delta = tuned.float() - base.float()
    expected = write_patch(base, torch.where(mask, delta, torch.zeros_like(delta)), mask)
    keep_(base, tuned, mask)
    assert torch.equal(base.view(word), expected.view(word))


def test_max_ram_shrinks_the_ring_or_is_refused(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    free = plan_patch(base, tuned, tmp_path / "out")
    tight = plan_patch(base, tuned, tmp_path / "out", options=RunOptions(max_ram=free.ram))
    assert tight.ram <= free.ram
    with pytest.raises(UsageError, match=r"max_vram of 1000 bytes is too little"):
        patch_checkpoint(base, tuned, tmp_path / "out", options=RunOptions(max_vram=1000))
    with pytest.raises(UsageError, match=r"max_ram of 10000 bytes is too little"):
        patch_checkpoint(base, tuned, tmp_path / "out", options=RunOptions(max_ram=10_000))
