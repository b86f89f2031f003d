"""Pairs whose tensors differ: new rows of a vocabulary, tensors of one input, tied weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.saving import patch_to_file
from tailor_fast.patching.verify import verify_output
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, moved, save_pair, write_texts
from tests.patching.test_checkpoints import words

OPTIONS = RunOptions(batch_size=4, max_shard_bytes=40_000)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = 3  # that the tuned vocabulary has more


def resized(model: Any, rows: int) -> Any:
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    return grown


def grown_pair(folder: Path, rows: int = ROWS, **options: Any) -> tuple[Path, Path]:
    base = llama(**options)
    return save_pair(folder, base, moved(resized(base, rows)), text_tokenizer())


def edit(folder: Path, change: Any) -> None:
    """Rewrite a checkpoint's tensors as one file."""
    tensors = words(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("untouched", ["base", "tuned"])
@pytest.mark.parametrize("data", [False, True])
def test_new_rows_are_those_of_tuned(untouched: Any, data: bool, tmp_path: Path) -> None:
    base, tuned = grown_pair(tmp_path)
    given = {"calibration": write_texts(tmp_path / "new.jsonl", 6)} if data else {}
    out = tmp_path / "out"
    recipe = Recipe(untouched=untouched)
    report = patch_checkpoint(base, tuned, out, recipe, options=OPTIONS, **given)
    before, between, after = words(base), words(tuned), words(out)
    for name in VOCABULARY:
        old = len(before[name])
        assert after[name].shape == between[name].shape == (old + ROWS, before[name].shape[1])
        assert torch.equal(after[name][old:], between[name][old:])
        expected = before if untouched == "base" else between
        assert torch.equal(after[name][:old], expected[name][:old])
    assert any("new rows of 'lm_head.weight', 'model.embed_tokens" in n for n in report.notes)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(after["lm_head.weight"])
    found = verify_output(out)
    assert found.ok, found.violations


def test_new_tokens_run_through_the_patched_model(tmp_path: Path) -> None:
    """Where the rest is base's, the patched model that runs still knows the new rows."""
    base, tuned = grown_pair(tmp_path)
    new = tmp_path / "new.jsonl"
    tokenizer = text_tokenizer()
    tokenizer.add_tokens(["new0", "new1", "new2"])
    tokenizer.save_pretrained(tuned)
    with new.open("w") as file:
        for text in ("a new0 b", "new2 new1 c d", "b a new2"):
            file.write(json.dumps({"prompt": text, "answer": "a b"}) + "\n")
    report = patch_checkpoint(base, tuned, tmp_path / "out", calibration=new, options=OPTIONS)
    assert all(row.loss <= row.loss_undecorated for row in report.linears)
    assert report.kept > 0


def test_verify_sees_a_changed_row(tmp_path: Path) -> None:
    base, tuned = grown_pair(tmp_path)
    for row, sentence in ((0, "rows that base has differ from base"), (-1, "its digest is not")):
        out = tmp_path / f"out{row}"
        patch_checkpoint(base, tuned, out, options=RunOptions())
        path = out / "model.safetensors"
        raw = bytearray(path.read_bytes())
        header = int.from_bytes(raw[:8], "little")
        begin, end = json.loads(raw[8 : 8 + header])["lm_head.weight"]["data_offsets"]
        raw[8 + header + (begin if row == 0 else end - 1)] ^= 1
        path.write_bytes(raw)
        assert any(sentence in violation for violation in verify_output(out).violations)


def test_nothing_is_cropped_and_no_layer_resized(tmp_path: Path) -> None:
    base, tuned = grown_pair(tmp_path)
    with pytest.raises(InputError, match=r"embed_tokens\.weight': shape .*none is cropped"):
        patch_checkpoint(tuned, base, tmp_path / "out")
    wide = "model.layers.0.mlp.up_proj.weight"
    edit(tuned, lambda t: t | {wide: torch.cat([t[wide], t[wide]])})
    with pytest.raises(InputError, match="only embeddings and heads may have new rows"):
        patch_checkpoint(base, tuned, tmp_path / "out")
    edit(tuned, lambda t: t | {wide: torch.cat([t[wide], t[wide]], 1)})
    with pytest.raises(InputError, match="both must be the same architecture"):
        patch_checkpoint(base, tuned, tmp_path / "out")


@pytest.mark.parametrize("untouched", ["base", "tuned"])
@pytest.mark.parametrize("missing", [None, "base", "tuned"])
def test_tensors_that_one_input_has(missing: Any, untouched: Any, tmp_path: Path) -> None:
    base = llama(blocks=2)
    paths = save_pair(tmp_path, base, moved(base), text_tokenizer())
    mine, theirs = {"old.scale": torch.ones(3)}, {"new.weight": torch.full((2, 5), 2.0)}
    edit(paths[0], lambda tensors: tensors | mine)
    edit(paths[1], lambda tensors: tensors | theirs)
    (paths[0] / "generation_config.json").write_text('{"base": 1}')
    out, recipe = tmp_path / "out", Recipe(missing=missing, untouched=untouched)
    if missing is None:
        with pytest.raises(
            InputError, match=r"base: has 1 tensors that .*: 'old\.scale'; .*or say"
        ):
            patch_checkpoint(*paths, out, recipe)
        return
    report = patch_checkpoint(*paths, out, recipe, options=OPTIONS)
    after = words(out)
    kept, lost = (mine, theirs) if missing == "base" else (theirs, mine)
    for name, tensor in kept.items():
        assert torch.equal(after[name], tensor)
    assert not lost.keys() & after.keys()
    assert len(report.linears) == 14
    notes = " ".join(report.notes)
    assert f"and kept: '{next(iter(kept))}'" in notes
    assert f"and left out: '{next(iter(lost))}'" in notes
    source = paths[0] if missing == "base" else paths[1]
    expected = (source / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == expected
    found = verify_output(out)
    assert found.ok, found.violations
    (out / "model-00001-of-00002.safetensors").unlink(missing_ok=True)


def test_what_missing_cannot_do(tmp_path: Path) -> None:
    base = llama(blocks=2)
    paths = save_pair(tmp_path, base, moved(base), text_tokenizer())
    bias = "model.layers.0.mlp.up_proj.bias"
    edit(paths[1], lambda tensors: tensors | {bias: torch.zeros(64)})
    with pytest.raises(UsageError, match="runs with tensors that missing 'base' leaves out"):
        patch_checkpoint(
            *paths,
            tmp_path / "out",
            Recipe(missing="base"),
            calibration=write_texts(tmp_path / "new.jsonl", 3),
        )
    with pytest.raises(UsageError, match="go into a patch file; leave save_patch out"):
        patch_to_file(
            *paths,
            tmp_path / "out",
            Recipe(missing="tuned"),
            save_patch=tmp_path / "p.tailor.safetensors",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [0, ROWS])
def test_tied_weights_stay_tied(rows: int, tmp_path: Path) -> None:
    base = llama(blocks=2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base, tuned = save_pair(tmp_path, base, moved(resized(base, rows)), text_tokenizer())
    assert "lm_head.weight" not in words(base)
    patch_checkpoint(base, tuned, tmp_path / "out", Recipe(untouched="tuned"), options=OPTIONS)
    assert words(tmp_path / "out").keys() == words(base).keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = words(tuned)["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize("holder", ["base", "tuned"])
def test_a_tied_weight_that_one_input_holds_twice(holder: str, tmp_path: Path) -> None:
    base = llama(blocks=2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    paths = save_pair(tmp_path, base, moved(base), text_tokenizer())
    twice = paths[holder == "tuned"]
    edit(twice, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    report = patch_checkpoint(*paths, tmp_path / "out", options=OPTIONS)
    assert "lm_head.weight" not in words(tmp_path / "out")
    assert any("tied: 'lm_head.weight' is left out" in note for note in report.notes)
    assert verify_output(tmp_path / "out").ok
    edit(twice, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(InputError, match=r"'lm_head\.weight': is tied to 'model\.embed_tokens"):
        plan_patch(*paths, tmp_path / "other")


def test_weights_that_both_hold_twice_stay_equal(tmp_path: Path) -> None:
    base = llama(blocks=2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    paths = save_pair(tmp_path, base, moved(base), text_tokenizer())
    for path in paths:
        edit(path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    patch_checkpoint(*paths, tmp_path / "out", Recipe(untouched="tuned"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], words(paths[1])["lm_head.weight"])
