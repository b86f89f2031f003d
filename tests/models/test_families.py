"""Every family from base and tuned to a patched model that loads and generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tailor_fast import save_batches
from tailor_fast.calibration.options import RunOptions
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.ops.select import kept_count
from tailor_fast.patching.checkpoints import patch_checkpoint
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.tailor import tailor_model
from tests.cli.running import CommandLine
from tests.models.zoo import FAMILIES, PREPARED, save_family

OPTIONS = RunOptions(batch_size=4)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def batches_of(folder: Path, data: Path, config: Any) -> list[dict[str, torch.Tensor]]:
    return make_batches(
        read_samples(data), load_processor(folder), batch_size=4, max_length=64, config=config
    )


def check_words(base: Path, out: Path, report: Report) -> None:
    """Kept words as reported, everything else base's own."""
    before, after = stored(base), stored(out)
    rows = {row.tensor: row for row in report.linears}
    assert set(after) == set(before)
    for name, value in after.items():
        changed = int((value.view(torch.int32) != before[name].view(torch.int32)).sum())
        row = rows.get(name)
        assert changed <= (0 if row is None else row.kept), name
        assert row is None or row.kept in (0, kept_count(value.numel(), 0.1)), name
        assert row is None or bool(row.kept) == bool(changed), name


def aligned(model: Any) -> Any:
    """``model`` with its weights moved out of the file's pages.

    There they begin anywhere, and matrix products round differently by the bytes' alignment.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def generates(folder: Path, kind: Any, batch: dict[str, torch.Tensor]) -> None:
    model = kind.from_pretrained(folder)
    prompt = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_patched_loads_and_generates(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, tuned, data = save_family(family, tmp_path)
    out = tmp_path / "out"
    report = patch_checkpoint(base, tuned, out, Recipe(), calibration=data, options=OPTIONS)
    check_words(base, out, report)
    assert len(report.linears) > 7
    for row in report.linears:
        if row.kept:
            assert row.loss <= min(row.loss_undecorated, row.loss_reverted), row.name
        else:
            assert row.note == "left at base: no counted token reaches it"
            assert ".experts." in row.name

    kind = type(family.build())
    models = [aligned(kind.from_pretrained(path)) for path in (base, tuned)]
    batches = batches_of(tuned, data, models[0].config)
    expected = tailor_model(*models, batches, Recipe())
    loaded = kind.from_pretrained(out).state_dict()
    for key, value in expected.model.state_dict().items():
        assert torch.equal(loaded[key], value), key
    assert {row.name for row in report.linears} == {row.name for row in expected.report.linears}
    generates(out, kind, batches[0])


def pictures_as_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths with a picture of four merged patches each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 10, (2, 4), generator=generator)
    ids = torch.cat([torch.tensor([[1, 12, *[10] * 4, 13]] * 2), words], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(32, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 10).int(),
    }


@pytest.mark.parametrize("name", PREPARED)
def test_a_family_with_prepared_tensors_is_patched_loads_and_generates(
    name: str, tmp_path: Path
) -> None:
    family = PREPARED[name]
    base, tuned, _ = save_family(family, tmp_path)
    kind = type(family.build())
    batches = [pictures_as_tensors(seed) for seed in (0, 1)]
    result = tailor_model(*(kind.from_pretrained(path) for path in (base, tuned)), batches)
    rows = {row.name: row for row in result.report.linears}
    assert {row.tokens for name, row in rows.items() if "language_model" in name} == {40}
    assert all(row.loss <= min(row.loss_undecorated, row.loss_reverted) for row in rows.values())
    result.model.save_pretrained(tmp_path / "memory")
    before, after = stored(base), stored(tmp_path / "memory")
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert len(changed) == len(rows) > 7
    assert not any("visual.blocks" in key for key in changed)
    # The model's class runs from disk too: without data, as its processor is missing.
    report = patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)
    check_words(base, tmp_path / "out", report)
    assert {row.name for row in report.linears} == set(rows)
    for folder in ("memory", "out"):
        generates(tmp_path / folder, kind, batches[0])


@pytest.mark.parametrize("name", PREPARED)
def test_the_command_line_takes_prepared_tensors(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = PREPARED[name]
    base, tuned, _ = save_family(family, tmp_path)
    kind = type(family.build())
    batches = [pictures_as_tensors(seed) for seed in range(3)]
    new, old, out = (tmp_path / part for part in ("new.safetensors", "old.safetensors", "out"))
    save_batches(batches[:2], new)
    save_batches(batches[2:], old)
    run = CommandLine(capsys)
    arguments = (base, tuned, "-o", out, "--calibration", new, "--retain", old)
    for command in ("plan", "patch"):
        done = run(command, *arguments)
        assert done.code == 0, done.err
    models = (kind.from_pretrained(path) for path in (base, tuned))
    expected = tailor_model(*models, batches[:2], retain_batches=batches[2:]).model.state_dict()
    loaded = kind.from_pretrained(out).state_dict()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    generates(out, kind, batches[0])


@pytest.mark.parametrize("decorate", ["exact", "obs"])
@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_the_command_line_patches_pictures_in_both_decorations(
    name: str, decorate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(capsys)
    family = FAMILIES[name]
    base, tuned, data = save_family(family, tmp_path)
    out = tmp_path / "out"
    arguments = (base, tuned, "-o", out, "--calibration", data, "--decorate", decorate)
    assert run("plan", *arguments).code == 0
    done = run("patch", *arguments, "--batch-size", 4)
    assert done.code == 0, done.err
    assert run("verify", out).code == 0
    report = json.loads((out / "tailor_report.json").read_text())
    assert report["recipe"]["decorate"] == decorate
    assert all(row["loss"] is not None for row in report["linears"])
    kind = type(family.build())
    config = kind.from_pretrained(base).config
    generates(out, kind, batches_of(tuned, data, config)[0])
