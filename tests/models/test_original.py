"""LLaVA in its authors' layout: patched without running, or by statistics of the converted one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_fast._core.errors import InputError
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.options import RunOptions
from tailor_fast.models import is_original, transformers_name
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tests.models.zoo import FAMILIES, save_family

OPTIONS = RunOptions(batch_size=4)
# Names of the hub's layout -> those of the authors' code.
AUTHORS = (
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
)


def words(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def authors_name(name: str) -> str:
    for pattern, other in AUTHORS:
        name, found = re.subn(pattern, other, name, count=1)
        if found:
            break
    return name


def as_authors(folder: Path) -> Path:
    """Write the checkpoint once more as the authors' code does."""
    place = folder.with_name(f"{folder.name}-authors")
    place.mkdir()
    renamed = {authors_name(name): tensor for name, tensor in words(folder).items()}
    save_file(renamed, place / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llava")
    base, tuned, data = save_family(FAMILIES["llava"], folder)
    pair = {"base": base, "tuned": tuned}
    authors = {f"authors-{role}": as_authors(path) for role, path in pair.items()}
    return {**pair, **authors, "data": data}


def test_names_of_the_authors_mean_those_of_the_class() -> None:
    assert is_original(["lm_head.weight", "model.mm_projector.0.weight"])
    assert not is_original(["multi_modal_projector.linear_1.weight"])
    projector, tower = "model.multi_modal_projector.linear_2", "model.vision_tower.encoder.layers.0"
    assert transformers_name("model.mm_projector.2") == projector
    for middle in ("", "vision_model."):
        name = f"model.vision_tower.vision_tower.{middle}encoder.layers.0"
        assert transformers_name(name) == tower
    assert transformers_name("model.layers.3.mlp") == "model.language_model.layers.3.mlp"
    assert transformers_name("lm_head") == "lm_head"


def test_without_data_both_layouts_give_the_same_words(
    place: dict[str, Path], tmp_path: Path
) -> None:
    recipe = Recipe(ignore="vision")
    theirs = patch_checkpoint(place["base"], place["tuned"], tmp_path / "a", recipe)
    ours = patch_checkpoint(place["authors-base"], place["authors-tuned"], tmp_path / "b", recipe)
    assert {row.name: row.kept for row in ours.linears} == {
        row.name: row.kept for row in theirs.linears
    }
    assert ours.kept > 0
    assert any("the layout of LLaVA's authors" in note for note in ours.notes)
    expected = words(tmp_path / "a")
    written = words(tmp_path / "b")
    assert len(written) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[authors_name(name)], tensor), name


def test_statistics_of_the_converted_model_are_taken(
    place: dict[str, Path], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    calibrate(place["tuned"], place["data"], stats, options=OPTIONS)
    patch_checkpoint(place["base"], place["tuned"], tmp_path / "a", statistics=stats)
    pair = place["authors-base"], place["authors-tuned"]
    report = patch_checkpoint(*pair, tmp_path / "b", statistics=stats)
    assert all(row.loss is not None for row in report.linears if row.kept)
    expected, written = words(tmp_path / "a"), words(tmp_path / "b")
    for name, tensor in expected.items():
        assert torch.equal(written[authors_name(name)], tensor), name

    other = tmp_path / "other.safetensors"
    calibrate(place["base"], place["data"], other, options=OPTIONS)
    with pytest.raises(InputError, match=r"are of another model .* than TUNED"):
        patch_checkpoint(*pair, tmp_path / "c", statistics=other)


def test_running_it_is_refused_with_the_remedy(place: dict[str, Path], tmp_path: Path) -> None:
    pair = place["authors-base"], place["authors-tuned"]
    remedy = r"which transformers cannot run; .* convert_llava_weights_to_hf\.py"
    for run in (patch_checkpoint, plan_patch):
        with pytest.raises(InputError, match=remedy):
            run(*pair, tmp_path / "out", calibration=place["data"], options=OPTIONS)
    with pytest.raises(InputError, match=remedy):
        calibrate(pair[1], place["data"], tmp_path / "s.safetensors", options=OPTIONS)
    assert not (tmp_path / "out").exists()
