"""``patch_checkpoint``: the bytes of ``tailor_model``, in bounded memory, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from tailor_fast._core import machine
from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import Checkpoint
from tailor_fast.models import find_targets
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.tailor import tailor_model
from tests.patching.disk import llama_pair, llava_pair, write_scenes, write_texts

OPTIONS = RunOptions(batch_size=4, max_shard_bytes=40_000)


def words(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
    return tensors


def in_memory(base: Path, tuned: Path, kind: Any, recipe: Recipe, data: tuple[Path, Path | None]):
    """What ``tailor_model`` gives for the same pair and data."""
    models = [kind.from_pretrained(path, dtype="auto") for path in (base, tuned)]
    processor = load_processor(tuned)

    def batches(path: Path, tokens: Literal["all", "answer"] = "all") -> list[Any]:
        how = {"batch_size": 4, "max_length": 2048, "config": models[0].config}
        dtype = models[0].dtype
        return list(make_batches(read_samples(path), processor, dtype=dtype, tokens=tokens, **how))

    new, old = (None if path is None else batches(path) for path in data)
    for batch, answers in zip(
        old or (), batches(data[1], "answer") if data[1] else (), strict=True
    ):
        # By them the retention weight is measured.
        batch["labels"] = torch.where(answers["token_mask"], batch["input_ids"], -100)
    return tailor_model(*models, new, recipe, retain_batches=old)


RECIPES = {
    "asymmetric": Recipe(),
    "sequential": Recipe(propagate="sequential"),
    "none": Recipe(propagate="none"),
    "block": Recipe(group="block"),
    "global": Recipe(scope="global", density=0.2),
    "obs": Recipe(decorate="obs", propagate="sequential"),
    "tuned": Recipe(untouched="tuned"),
}


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_llama_from_disk_equals_llama_in_memory(name: str, retain: bool, tmp_path: Path) -> None:
    if retain and name == "obs":
        pytest.skip("the sweep has no retention term")
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    old = write_texts(tmp_path / "old.jsonl", seed=9) if retain else None
    out = tmp_path / "out"
    patch_checkpoint(base, tuned, out, RECIPES[name], calibration=new, retain=old, options=OPTIONS)
    expected = in_memory(base, tuned, AutoModelForCausalLM, RECIPES[name], (new, old))
    written = words(out)
    assert set(written) == set(words(base))
    for key, value in expected.model.state_dict().items():
        if key in written:
            assert torch.equal(written[key], value), key
    assert len(list(out.glob("*.safetensors"))) > 1


def test_llava_from_disk_equals_llava_in_memory_and_loads(tmp_path: Path) -> None:
    base, tuned = llava_pair(tmp_path)
    new, old = (write_scenes(tmp_path / f"{n}.jsonl", seed=s) for n, s in (("new", 1), ("old", 2)))
    out = tmp_path / "out"
    report = patch_checkpoint(
        base, tuned, out, Recipe(), calibration=new, retain=old, options=OPTIONS
    )
    kind = LlavaForConditionalGeneration
    expected = in_memory(base, tuned, kind, Recipe(), (new, old)).model.state_dict()
    loaded = kind.from_pretrained(out, dtype="auto")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    changed = {row.tensor for row in report.linears}
    before, after = words(base), words(out)
    assert changed
    assert not any("vision_tower" in name for name in changed)
    for key, value in after.items():
        count = int((value != before[key]).sum())
        assert count <= (0.1 * value.numel() if key in changed else 0), key
    assert all(path.name in {p.name for p in out.iterdir()} for path in tuned.glob("*.json"))


def test_half_the_models_size_gives_the_same_bytes(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=24, width=32)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    data = {
        "calibration": write_texts(tmp_path / "new.jsonl", count=12),
        "retain": write_texts(tmp_path / "old.jsonl", count=12, seed=9),
    }
    free, tight = tmp_path / "free", tmp_path / "tight"
    options = replace(OPTIONS, batch_size=1)
    patch_checkpoint(base, tuned, free, options=options, **data)
    limited = replace(options, max_ram=size // 2)
    patch_checkpoint(base, tuned, tight, options=limited, **data)
    for path in free.glob("*.safetensors*"):
        assert path.read_bytes() == (tight / path.name).read_bytes()


def test_without_data_salience_alone_decides(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, dtype=torch.bfloat16)
    out = tmp_path / "out"
    report = patch_checkpoint(base, tuned, out, options=OPTIONS)
    before, between, after = words(base), words(tuned), words(out)
    for row in report.linears:
        changed = after[row.tensor] != before[row.tensor]
        assert 0 < int(changed.sum()) <= row.kept
        assert torch.equal(after[row.tensor][changed], between[row.tensor][changed])


def test_a_lone_file_is_patched_by_names_and_shapes(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=1)
    files = []
    for path in (base, tuned):
        from safetensors.torch import save_file

        files.append(tmp_path / f"{path.name}.safetensors")
        save_file(words(path), files[-1])
    report = patch_checkpoint(*files, tmp_path / "out", options=OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(base)
    names = {target.name for target in find_targets(model)}
    assert {row.name for row in report.linears} == names
    assert any("by name and shape" in note for note in report.notes)


def test_report_picture_card_and_manifest_are_written(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    out = tmp_path / "out"
    new = write_texts(tmp_path / "new.jsonl")
    patch_checkpoint(base, tuned, out, calibration=new, options=OPTIONS)
    report = json.loads((out / "tailor_report.json").read_text())
    assert report["kept"] == sum(row["kept"] for row in report["linears"])
    assert (out / "tailor_report.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert 'base_model:\n- "base"\n- "tuned"\n' in card
    assert str(tmp_path) not in card
    manifest = json.loads((out / "tailor_manifest.json").read_text())
    assert {"inputs", "output", "recipe", "versions"} <= set(manifest)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_when_a_run_fails(tmp_path: Path, monkeypatch: Any) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("tailor_fast.patching.checkpoints.draw_report", fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    options = replace(OPTIONS, resume="never")
    with pytest.raises(RuntimeError, match="broken"):
        patch_checkpoint(base, tuned, tmp_path / "out", calibration=new, options=options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_work_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    options = RunOptions(max_ram=1000)
    with pytest.raises(UsageError, match="max_ram of 1000 bytes is too little"):
        patch_checkpoint(base, tuned, tmp_path / "out", calibration=new, options=options)
    with pytest.raises(UsageError, match=r"max_ram of 1\d{18} bytes is more than the memory of"):
        plan_patch(base, tuned, tmp_path / "out", options=RunOptions(max_ram=10**18))
    with pytest.raises(
        UsageError, match=r"no layer to .* that targets 'nothing', layers '7' leave"
    ):
        patch_checkpoint(base, tuned, tmp_path / "out", Recipe(targets="nothing", layers="7"))
    with pytest.raises(OutputError, match="is, or lies in, the input"):
        patch_checkpoint(base, tuned, tuned)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        patch_checkpoint(base, tuned, tmp_path / "out")
    (tuned / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        patch_checkpoint(base, tuned, tmp_path / "other", calibration=new)


def test_a_run_that_the_machine_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    out, before = tmp_path / "out", sorted(tmp_path.iterdir())
    reads: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_into", lambda self, name, *_: reads.append(name))
    for given in ({}, {"calibration": new}):
        plan = plan_patch(base, tuned, out, options=OPTIONS, **given)
        monkeypatch.setattr(machine, "memory", lambda need=plan.ram_peak: (need - 1, need))
        told = f"takes {plan.ram_peak} bytes of memory, of which {plan.ram_peak - 1} are free"
        assert told in plan_patch(base, tuned, out, options=OPTIONS, **given).notes[-1]
        monkeypatch.setattr(machine, "memory", lambda need=plan.ram_peak: (need - 1, need - 1))
        for run in (plan_patch, patch_checkpoint):
            with pytest.raises(UsageError, match=f"the run takes {plan.ram_peak} bytes of memory"):
                run(base, tuned, out, options=OPTIONS, **given)
        monkeypatch.undo()
        monkeypatch.setattr(Checkpoint, "read_into", lambda self, name, *_: reads.append(name))
    assert reads == []
    assert sorted(tmp_path.iterdir()) == before


def test_plan_says_what_the_run_then_does(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    out = tmp_path / "out"
    plan = plan_patch(base, tuned, out, calibration=new, options=OPTIONS)
    assert not out.exists()
    report = patch_checkpoint(base, tuned, out, calibration=new, options=OPTIONS)
    assert {layer.name for layer in plan.layers} == {row.name for row in report.linears}
    assert plan.kept == report.kept
    assert plan.weights == report.targeted
    assert plan.disk == sum(path.stat().st_size for path in out.glob("*.safetensors*"))
