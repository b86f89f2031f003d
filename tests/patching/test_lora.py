"""TUNED as a LoRA adapter: what peft merges, patched by every command as the merged model would be.

The adapters are made by peft itself. Its merged weights may differ from ours by a rounding, which
may exchange two words of nearly equal score; so the merged words are compared with peft's, and the
patched ones, bit for bit, with those of a checkpoint that holds the same merged words.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import Checkpoint, adapter_view, open_checkpoint, open_tuned
from tailor_fast.models import names_as_stored
from tailor_fast.patching import memory
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.testing import assert_within
from tests.cli.running import CommandLine
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, llava_pair, write_scenes, write_texts
from tests.patching.test_checkpoints import words
from tests.patching.test_datafree import gpt2_pair

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tailor_fast[peft]'")

# peft calls transformers by names that go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

OPTIONS = RunOptions(batch_size=4, max_shard_bytes=40_000)
SOME = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": SOME},
    "rslora, patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": SOME,
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": SOME},
    "whole modules": {
        "r": 2,
        "target_modules": ["o_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "up_proj"]},
}


def trained(model: Any, settings: dict[str, Any], seed: int = 3) -> Any:
    """A copy of ``model`` with an adapter that has moved."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                step = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype))
    return adapted


def lora_pair(folder: Path, name: str = "plain") -> tuple[Path, Path, Any]:
    """A LLaMA in bf16, an adapter, and what peft makes of the two."""
    base = llama(dtype=torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    text_tokenizer().save_pretrained(folder / "base")
    adapted = trained(base, SETTINGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it saves embeddings too
        adapted.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora", adapted.merge_and_unload()


def merged_words(base: Path, lora: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(base) as source, open_tuned(lora, source, names_as_stored) as view:
        return {name: view.read(name) for name in view.tensors}


def save_merged(base: Path, lora: Path, out: Path) -> Path:
    """A checkpoint with the view's words."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(merged_words(base, lora), out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_the_words_are_those_that_peft_merges(name: str, tmp_path: Path) -> None:
    base, lora, merged = lora_pair(tmp_path, name)
    before, state, moved = words(base), merged.state_dict(), 0
    for key, got in merged_words(base, lora).items():
        expected = state[key]
        moved += not torch.equal(got, before[key])
        # peft's own sum in fp32 or bf16, rounded to bf16, and ours: a rounding apart.
        assert_within(got, expected.double(), expected, torch.bfloat16)
        if torch.equal(expected, before[key]):
            assert torch.equal(got, before[key]), key
    assert moved >= 3


def test_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, _ = gpt2_pair(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapted = trained(model, settings)
    adapted.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload().state_dict()
    got = merged_words(base, tmp_path / "lora")
    for key, value in got.items():
        full = key if key in expected else f"transformer.{key}"
        assert_within(value, expected[full].double(), expected[full], torch.float16)
    report = patch_checkpoint(base, tmp_path / "lora", tmp_path / "out", options=OPTIONS)
    assert {row.tensor for row in report.linears} == {
        k for k in got if "c_" in k and "c_fc" not in k and k.endswith("weight")
    }


RECIPES = {
    "free": (Recipe(), False),
    "free, rest tuned": (Recipe(untouched="tuned", scope="global"), False),
    "asymmetric": (Recipe(), True),
    "rest tuned": (Recipe(untouched="tuned", propagate="sequential"), True),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("setting", ["rslora, patterns", "whole modules"])
def test_a_patch_is_that_of_the_merged_model(name: str, setting: str, tmp_path: Path) -> None:
    base, lora, _ = lora_pair(tmp_path, setting)
    merged = save_merged(base, lora, tmp_path / "merged")
    recipe, data = RECIPES[name]
    given = {"calibration": write_texts(tmp_path / "new.jsonl", 6)} if data else {}
    reports = [
        patch_checkpoint(
            base, tuned, tmp_path / f"out-{tuned.name}", recipe, options=OPTIONS, **given
        )
        for tuned in (lora, merged)
    ]
    ours, theirs = (words(tmp_path / f"out-{name}") for name in ("lora", "merged"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    rows = [[(row.name, row.kept, row.loss) for row in report.linears] for report in reports]
    assert rows[0] == rows[1]
    assert reports[0].kept > 0
    digests = [
        json.loads((tmp_path / f"out-{name}" / "tailor_manifest.json").read_text())["inputs"]
        for name in ("lora", "merged")
    ]
    assert digests[0]["tuned"]["root"] == digests[1]["tuned"]["root"]
    assert list(digests[0]["tuned"]["files"]) == ["adapter_model.safetensors"]


def test_small_memory_gives_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora, _ = lora_pair(tmp_path)
    patch_checkpoint(base, lora, tmp_path / "free", Recipe(untouched="tuned"), options=OPTIONS)
    for name, size in (("RING_BYTES", 8 << 10), ("LEAST_RING_BYTES", 8 << 10), ("_PARTS", 2)):
        monkeypatch.setattr(memory, name, size)
    monkeypatch.setattr(memory, "COPY_BYTES", 1 << 10)
    plan = plan_patch(base, lora, tmp_path / "tight", Recipe(untouched="tuned"), options=OPTIONS)
    limited = RunOptions(max_shard_bytes=40_000, max_ram=plan.ram)
    patch_checkpoint(base, lora, tmp_path / "tight", Recipe(untouched="tuned"), options=limited)
    free, tight = words(tmp_path / "free"), words(tmp_path / "tight")
    assert all(torch.equal(free[key], tight[key]) for key in free)
    limited = RunOptions(max_ram=plan.ram - 1)
    with pytest.raises(UsageError, match="is too little"):
        patch_checkpoint(base, lora, tmp_path / "none", Recipe(untouched="tuned"), options=limited)


def test_what_the_adapter_leaves_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora, _ = lora_pair(tmp_path)
    counts: Counter[str] = Counter()
    made: Counter[str] = Counter()
    read_into, make = Checkpoint.read_into, adapter_view.AdapterView._made

    def counted(self: Checkpoint, name: str, *args: Any) -> int:
        count = read_into(self, name, *args)
        counts[name] += count
        return count

    def counted_rows(self: Any, info: Any, change: Any, first: int, last: int) -> torch.Tensor:
        made[info.name] += last - first
        return make(self, info, change, first, last)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    monkeypatch.setattr(adapter_view.AdapterView, "_made", counted_rows)
    patch_checkpoint(base, lora, tmp_path / "out", options=OPTIONS)
    for name, tensor in words(base).items():
        changed = any(part in name for part in SOME)
        assert counts[name] == (2 if changed else 1) * tensor.nbytes, name
        assert made[name] == (tensor.shape[0] if changed else 0), name


def test_llava_under_any_layout_of_names(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    base, _ = llava_pair(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype="auto")
    adapted = trained(model, {"r": 2, "target_modules": r".*language_model.*\.(q|v)_proj"})
    adapted.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload()
    expected.save_pretrained(tmp_path / "merged")
    theirs, ours = words(tmp_path / "merged"), merged_words(base, tmp_path / "lora")
    before = words(base)
    changed = [key for key in ours if not torch.equal(ours[key], before[key])]
    assert changed
    assert all(key.startswith("language_model.") for key in changed)
    for key, value in ours.items():
        assert_within(value, theirs[key].double(), theirs[key], value.dtype)
    data = write_scenes(tmp_path / "new.jsonl", 4)
    out = tmp_path / "out"
    patch_checkpoint(base, tmp_path / "lora", out, calibration=data, options=OPTIONS)
    LlavaForConditionalGeneration.from_pretrained(out)


def test_every_command_takes_an_adapter_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tailor_fast = CommandLine(capsys)
    base, lora, _ = lora_pair(tmp_path)
    save_merged(base, lora, tmp_path / "merged")
    write_texts(tmp_path / "new.jsonl", 6)
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        ran = tailor_fast(*line.split())
        assert ran.code == 0, f"{line}\n{ran.err}"
        return ran.out

    assert "LoRA of rank 4, alpha 8" in run("inspect lora")
    assert "self_attn.k_proj" not in run("plan base lora -o out")
    run("calibrate lora --base base --data new.jsonl -o lora.safetensors -q")
    run("calibrate merged --data new.jsonl -o merged.safetensors -q")
    assert (tmp_path / "lora.safetensors").read_bytes() == Path("merged.safetensors").read_bytes()
    run("patch base lora -o out --statistics merged.safetensors --untouched tuned -q")
    run("verify out -q")
    run("diff base lora -o lora.tailor.safetensors -q")
    run("apply base lora.tailor.safetensors -o applied -q")
    assert all(
        torch.equal(v, words(tmp_path / "applied")[k]) for k, v in words(Path("merged")).items()
    )
    run("patch base lora -o patched --save-patch p.safetensors --no-checkpoint -q")
    refused = tailor_fast("calibrate", "lora", "--data", "new.jsonl", "-o", "x.safetensors")
    assert refused.code == 2
    assert "lora: is an adapter; expected the model it was trained on with it; give" in refused.err
    refused = tailor_fast("patch", "lora", "base", "-o", "x")
    assert refused.code == 65
    assert "it is a PEFT adapter; give it as TUNED, and the model" in refused.err


def test_an_adapter_of_another_model_and_a_base_too_many(tmp_path: Path) -> None:
    base, lora, _ = lora_pair(tmp_path)
    other = llama(blocks=2, dtype=torch.bfloat16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"changes 3 layers that .*other lacks: .*layers\.2"):
        patch_checkpoint(tmp_path / "other", lora, tmp_path / "out")
    data = write_texts(tmp_path / "new.jsonl", 3)
    with pytest.raises(UsageError, match=r"base: is no adapter; base .* would have no use"):
        calibrate(base, data, tmp_path / "s.safetensors", base=base)
