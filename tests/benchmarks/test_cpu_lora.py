"""The gate of the adapter benchmark, on outputs that are, and are not, one another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import cpu_lora
from benchmarks.pairs import Shape, write_pair
from tailor_fast.checkpoint import open_checkpoint, open_tuned
from tailor_fast.models import names_as_stored

SIDE = 64


def save(folder: Path, words: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"q_proj.weight": words}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(SIDE, SIDE).bfloat16()
    save(folder / "base", base)
    patched = base.clone()
    patched[::2] *= 2
    save(folder / "merged", patched)
    return base, patched.clone()


def checked(folder: Path) -> None:
    cpu_lora.check(folder / "base", folder / "merged", folder / "adapted")


def test_one_rounding_of_one_word_passes(tmp_path: Path) -> None:
    _, patched = outputs(tmp_path)
    patched.view(torch.int16)[0, 0] += 1
    save(tmp_path / "adapted", patched)
    checked(tmp_path)


def test_a_word_that_is_two_roundings_away_is_refused(tmp_path: Path) -> None:
    _, patched = outputs(tmp_path)
    patched.view(torch.int16)[0, 0] += 2
    save(tmp_path / "adapted", patched)
    with pytest.raises(SystemExit, match=r"q_proj\.weight: a patched word is more than a rounding"):
        checked(tmp_path)


@pytest.mark.parametrize("kind", ["not patched", "all rounded", "nothing"])
def test_outputs_that_differ_are_refused(tmp_path: Path, kind: str) -> None:
    base, patched = outputs(tmp_path)
    if kind == "not patched":
        patched[0] = base[0]
    elif kind == "all rounded":
        patched.view(torch.int16)[0] += 1
    else:
        patched = base
        save_file({"q_proj.weight": base}, tmp_path / "merged" / "model.safetensors")
    save(tmp_path / "adapted", patched)
    with pytest.raises(SystemExit, match="the two outputs differ by more than a rounding"):
        checked(tmp_path)


def test_the_merged_checkpoint_is_the_adapter_merged(tmp_path: Path) -> None:
    shape = Shape(1, 32, 64, 2, 2, 10**6, vocabulary=64)
    base, _ = write_pair(tmp_path, shape)
    cpu_lora.write_adapter(base, tmp_path / "lora", 4)
    cpu_lora.write_merged(base, tmp_path / "lora", tmp_path / "merged", shape)
    moved = 0
    with (
        open_checkpoint(base) as ours,
        open_tuned(tmp_path / "lora", ours, names_as_stored) as adapted,
        open_checkpoint(tmp_path / "merged") as merged,
    ):
        for name in merged.tensors:
            actual, expected = adapted.read(name), merged.read(name)
            apart = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
            assert int(apart.max()) <= 1, name
            assert float((apart > 0).float().mean()) < 0.01, name
            moved += not torch.equal(expected, ours.read(name))
    assert moved == 7
