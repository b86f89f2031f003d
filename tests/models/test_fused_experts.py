"""Checkpoints that hold all experts of a block in one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tailor_fast._core.errors import InputError
from tailor_fast.calibration import calibrate
from tailor_fast.ops.select import kept_count, select_patch
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.tailor import tailor_model
from tests.models.processors import text_tokenizer
from tests.models.test_experts import mixture
from tests.patching.disk import moved, save_pair, write_texts

DENSITY = 0.05


def words(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = mixture("GptOss")
    return save_pair(tmp_path, base, moved(base), text_tokenizer())


def test_without_data_each_expert_is_a_unit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned, out = *pair, tmp_path / "out"
    recipe = Recipe(density=DENSITY)
    plan = plan_patch(base, tuned, out, recipe)
    report = patch_checkpoint(base, tuned, out, recipe)
    assert plan.kept == report.kept
    before, between, after = words(base), words(tuned), words(out)
    names = {row.name for row in report.linears if ".experts." in row.name}
    assert names == {
        f"model.layers.{block}.mlp.experts.{part}"
        for block in range(2)
        for part in ("gate_up_proj", "down_proj")
    }
    for name in names:
        for old, new, made in zip(before[name], between[name], after[name], strict=True):
            # Stored [in, out]: rows and blocks of columns are those of the layer itself.
            mask = select_patch(
                old.T.contiguous(), new.T.contiguous(), density=DENSITY, salience_weight=1.0
            )
            assert int(mask.sum()) == kept_count(old.numel(), DENSITY)
            delta = new - old
            assert torch.equal(made, torch.where(mask.T, old + delta, old))
    kind = AutoModelForCausalLM
    memory = tailor_model(*(kind.from_pretrained(p) for p in pair), recipe=recipe)
    assert all(torch.equal(after[name], value) for name, value in memory.model.state_dict().items())
    kind.from_pretrained(out).generate(torch.tensor([[1, 4]]), max_new_tokens=2)


@pytest.mark.parametrize("scope", ["layer", "global", "row", "block"])
def test_other_scopes_keep_what_they_keep_in_memory(
    scope: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = Recipe(density=DENSITY, scope=scope)
    patch_checkpoint(*pair, tmp_path / "out", recipe)
    models = (AutoModelForCausalLM.from_pretrained(path) for path in pair)
    expected = tailor_model(*models, recipe=recipe).model.state_dict()
    after = words(tmp_path / "out")
    assert all(torch.equal(after[name], value) for name, value in expected.items())


def test_a_lone_file_has_its_experts_patched_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = []
    for path in pair:
        files.append(tmp_path / f"{path.name}.safetensors")
        save_file(words(path), files[-1])
    report = patch_checkpoint(*files, tmp_path / "out", Recipe(density=DENSITY))
    before, after = (words(path) for path in (pair[0], tmp_path / "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    (row,) = (row for row in report.linears if row.tensor == name)
    changed = [int((a != b).sum()) for a, b in zip(after[name], before[name], strict=True)]
    assert changed == [kept_count(before[name][0].numel(), DENSITY)] * 4
    assert row.kept == sum(changed)


def test_running_it_from_disk_is_refused_with_the_remedy(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_texts(tmp_path / "new.jsonl")
    message = r"holds all experts of a block in one tensor; .* with tailor_model"
    for run in (patch_checkpoint, plan_patch):
        with pytest.raises(InputError, match=message):
            run(*pair, tmp_path / "out", calibration=data)
    with pytest.raises(InputError, match=message):
        calibrate(pair[1], data, tmp_path / "s.safetensors")
    assert not (tmp_path / "out").exists()
