"""``verify_output`` finds every kind of fault, and nothing in a sound output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.patching import verify
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.verify import PatchedTensor, verify_output
from tests.patching import outputs
from tests.patching.outputs import DENSITY, KEPT, PATCHED, Tensors, base_tensors, make_output, save


def shard_of(out: Path, name: str) -> Path:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    return out / index["weight_map"][name]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("block_bytes", [8 << 20, 1000, 8])
def test_a_sound_output_holds_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(verify, "BLOCK_BYTES", block_bytes)
    out = make_output(tmp_path)
    result = verify_output(out)
    assert result.ok
    assert result.violations == []
    changed = [tensor.changed for tensor in result.patched]
    moved = base_tensors()[PATCHED[0]].view(-1)[:KEPT]
    assert changed[0] == int((moved + 0.5 != moved).sum())
    assert result.patched[0] == PatchedTensor(PATCHED[0], 32 * 64, KEPT, changed[0])
    weights = sum(2 * tensor.nbytes for tensor in base_tensors().values())
    assert result.checked == {
        "files": len(list(out.iterdir())) - 1,  # the manifest does not list itself
        "tensors": 5,
        "untouched": 3,
        "weights": 2 * 32 * 64,
        "allowed": 2 * KEPT,
        "changed": sum(changed),
        "bytes": weights,
    }


def test_untouched_tensors_may_come_from_tuned(tmp_path: Path) -> None:
    recipe = Recipe(density=DENSITY, untouched="tuned")
    assert verify_output(make_output(tmp_path, recipe=recipe)).violations == []


def test_untouched_tensors_must_come_from_tuned_when_the_recipe_says_so(tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors["model.embed.weight"] = base_tensors()["model.embed.weight"]

    out = make_output(tmp_path, recipe=Recipe(density=DENSITY, untouched="tuned"), plant=plant)
    (violation,) = verify_output(out).violations
    assert violation.endswith(
        "tensor 'model.embed.weight': was not patched, but is not the tuned checkpoint's"
    )


def one_word_more(tensors: Tensors) -> None:
    tensors[PATCHED[1]].view(-1)[-1] = -0.0  # equal to base's 0.0 as a number
    moved = base_tensors()[PATCHED[1]].view(-1)[:KEPT]
    tensors[PATCHED[1]].view(-1)[:KEPT] = moved + 1  # every kept word differs


def not_a_number(tensors: Tensors) -> None:
    tensors[PATCHED[0]].view(-1)[3] = float("nan")


def infinite(tensors: Tensors) -> None:
    tensors[PATCHED[0]].view(-1)[4:6] = float("inf")


def negative_zero(tensors: Tensors) -> None:
    tensors["model.norm.weight"][0] = 0.0


def other_nan(tensors: Tensors) -> None:
    tensors["model.norm.weight"].view(torch.int32)[1] ^= 1


def other_integer(tensors: Tensors) -> None:
    tensors["steps"] += 1


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (one_word_more, f"{KEPT + 1} of 2048 words differ from base; k is {KEPT}"),
        (not_a_number, "1 changed words are NaN or infinite"),
        (infinite, "2 changed words are NaN or infinite"),
        (negative_zero, "was not patched, but 1 bytes differ from base"),
        (other_nan, "was not patched, but 1 bytes differ from base"),
        (other_integer, "was not patched, but 1 bytes differ from base"),
    ],
)
def test_a_fault_of_the_program_is_found(
    tmp_path: Path, plant: Callable[[Tensors], None], message: str
) -> None:
    (violation,) = verify_output(make_output(tmp_path, plant=plant)).violations
    assert violation.startswith(f"{tmp_path / 'out'}/model-")
    assert violation.endswith(message)


def test_a_report_that_keeps_more_than_its_density_is_found(tmp_path: Path) -> None:
    (violation,) = verify_output(make_output(tmp_path, report_kept=KEPT + 1)).violations
    assert "the report keeps 1026 of 4096 weights; density 0.25 allows 1024" in violation


def test_a_flipped_bit_on_disk_is_found(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    flip(shard_of(out, PATCHED[0]), -1)
    violations = verify_output(out).violations
    assert any("its digest is not the manifest's" in violation for violation in violations)
    assert verify_output(out, deep=False).ok  # headers and files are what they were


def test_a_flipped_header_is_found_without_reading_weights(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    shard = shard_of(out, "steps")
    content = shard.read_bytes()
    assert content.count(b'"pt"') == 1
    shard.write_bytes(content.replace(b'"pt"', b'"tf"'))
    (violation,) = verify_output(out, deep=False).violations
    assert violation == f"{shard}: its header is not the manifest's"


def test_changed_missing_and_shortened_files_are_found(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    flip(out / "config.json", 3)
    (violation,) = verify_output(out).violations
    assert violation == f"{out / 'config.json'}: its SHA-256 is not the manifest's"
    (out / "config.json").unlink()
    (violation,) = verify_output(out).violations
    assert "config.json: No such file or directory; the manifest lists it" in violation


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "lama"}, "cannot read it"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is no list"),
        ({"architectures": ["OtherForCausalLM"], "model_type": "other"}, None),
    ],
)
def test_a_configuration_that_transformers_refuses_is_found(
    config: dict[str, Any], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "CONFIG", config)
    out = make_output(tmp_path)
    for deep in (True, False):
        violations = verify_output(out, deep=deep).violations
        if said is None:  # not one of its models
            assert violations == []
        else:
            (violation,) = violations
            assert violation.startswith(f"{out / 'config.json'}: ")
            assert said in violation


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    gone = shard_of(out, PATCHED[0])
    gone.unlink()
    listed, opened = verify_output(out).violations
    assert listed == f"{gone}: No such file or directory; the manifest lists it"
    assert gone.name in opened


def test_an_index_that_lies_is_found(tmp_path: Path) -> None:
    out = make_output(tmp_path)

    def move(index: Any) -> None:
        names = sorted(set(index["weight_map"].values()))
        here = index["weight_map"]["steps"]
        index["weight_map"]["steps"] = next(name for name in names if name != here)

    edit(out / "model.safetensors.index.json", move)
    violations = verify_output(out).violations
    assert any("the index says" in violation for violation in violations)


def test_tensors_that_the_manifest_does_not_know_are_found(tmp_path: Path) -> None:
    out = make_output(tmp_path)

    def rename(manifest: Any) -> None:
        tensors = manifest["output"]["tensors"]
        tensors["other"] = tensors.pop("steps")

    edit(out / "tailor_manifest.json", rename)
    violations = verify_output(out).violations
    assert f"{out}: tensor 'other' is missing from the files" in violations
    assert f"{out}: tensor 'steps' is not in the manifest" in violations


def test_the_base_is_found_given_or_asked_for(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "base", moved)
    with pytest.raises(UsageError, match=r"no longer at .*base; give --base"):
        verify_output(out)
    assert verify_output(out, deep=False).ok
    assert verify_output(out, base=moved).ok
    edit(out / "tailor_report.json", lambda report: report.pop("inputs"))
    with pytest.raises(UsageError, match="it does not say; give --base"):
        verify_output(out)


def test_another_base_is_refused(tmp_path: Path) -> None:
    out = make_output(tmp_path)
    tensors = base_tensors()
    tensors[PATCHED[0]][0, 0] += 1
    other = save(tmp_path / "other", tensors)
    with pytest.raises(InputError, match="is not that of the base that the output was made from"):
        verify_output(out, base=other)


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", base_tensors())
    with pytest.raises(InputError, match=r"holds no tailor_manifest\.json; expected a directory"):
        verify_output(plain)
    out = make_output(tmp_path)
    edit(out / "tailor_manifest.json", lambda manifest: manifest.update(format="tailor/9"))
    with pytest.raises(InputError, match="format is 'tailor/9'; expected 'tailor-manifest/1'"):
        verify_output(out)
    (out / "tailor_manifest.json").write_text("[]")
    with pytest.raises(InputError, match="has no 'format'; expected a file that this project"):
        verify_output(out)
    (out / "tailor_manifest.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        verify_output(out)
