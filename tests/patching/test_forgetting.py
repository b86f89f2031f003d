"""The retention weight that samples call for: what is asked, counted, and said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from tailor_fast._core.processes import ALONE
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.prepared import save_batches
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching import Recipe, patch_checkpoint, plan_patch, tailor_model
from tailor_fast.patching.forgetting import settle_retain_weight
from tailor_fast.patching.head_passes import run_in_memory
from tailor_fast.patching.recipe import DEFAULT_RETAIN, MEASURED_RETAIN
from tailor_fast.patching.report import Report
from tests.models.processors import t5, text_tokenizer
from tests.patching.disk import (
    llama_pair,
    llava_pair,
    moved,
    save_pair,
    write_scenes,
    write_texts,
)
from tests.patching.toys import Toy, pair, token_batches

OPTIONS = RunOptions(batch_size=4)


def settled(base: nn.Module, tuned: nn.Module, batches: list[Any]) -> tuple[float, Report]:
    report = Report({})
    models = [(base, run_in_memory), (tuned, run_in_memory)]
    recipe = settle_retain_weight(Recipe(), models, batches, report, ALONE)
    return recipe.settled_retain_weight, report


def changed(base: Any, tuned: Any, batches: list[Any], prefix: str = "") -> tuple[int, int]:
    """Tokens that differ and tokens asked, from whole logits and one place at a time."""
    differ = asked = 0
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k not in ("token_mask", "labels")}
        with torch.no_grad():
            says = [model(**inputs, use_cache=False).logits.argmax(-1) for model in (base, tuned)]
        ids = batch[f"{prefix}input_ids"]
        mask = batch[f"{prefix}attention_mask"]
        mask = mask if prefix else batch.get("token_mask", mask)
        end = base.config.get_text_config().eos_token_id
        for row in range(len(ids)):
            for at in range(1, ids.shape[1]):
                if mask[row, at] and ids[row, at] != end:
                    asked += 1
                    differ += int(says[0][row, at - 1] != says[1][row, at - 1])
    return differ, asked


def noted(report: Any) -> str:
    [note] = [note for note in report.notes if note.startswith("retain_weight")]
    return str(note)


def batches_of(folder: Path, data: Path, **how: Any) -> list[Any]:
    made = make_batches(
        read_samples(data), load_processor(folder), batch_size=4, max_length=2048, **how
    )
    return list(made)


def test_answers_of_a_checkpoint_are_asked_for(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2)
    new, old = write_texts(tmp_path / "new.jsonl"), write_texts(tmp_path / "old.jsonl", seed=9)
    where = {"calibration": new, "retain": old, "options": OPTIONS}
    report = patch_checkpoint(base, tuned, tmp_path / "out", Recipe(density=0.2), **where)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, tuned)]
    differ, asked = changed(*models, batches_of(base, old, tokens="answer"))
    assert 0 < differ < asked
    weight = MEASURED_RETAIN * differ / asked
    assert noted(report) == (
        f"retain_weight {weight:.3g}: on old tasks, the tuned model would say"
        f" {100 * differ / asked:.1f}% of {asked} answer tokens otherwise than the base model"
    )
    manifest = json.loads((tmp_path / "out" / "tailor_manifest.json").read_text())
    assert manifest["recipe"]["retain_weight"] == weight
    given = Recipe(density=0.2, retain_weight=weight)
    patch_checkpoint(base, tuned, tmp_path / "again", given, **where)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_a_budget_for_activations_changes_nothing(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=3)
    data = {
        "calibration": write_texts(tmp_path / "new.jsonl", 24),
        "retain": write_texts(tmp_path / "old.jsonl", 24, seed=9),
    }
    recipe = Recipe(density=0.2, refits=0)
    least = plan_patch(base, tuned, tmp_path / "out", recipe, **data, options=OPTIONS).ram
    notes = {
        noted(
            patch_checkpoint(
                base,
                tuned,
                tmp_path / str(limit),
                recipe,
                **data,
                options=replace(OPTIONS, max_ram=limit),
            )
        )
        for limit in (None, least)
    }
    assert len(notes) == 1


def test_images_and_prepared_batches(tmp_path: Path) -> None:
    base, tuned = llava_pair(tmp_path)
    scenes = write_scenes(tmp_path / "old.jsonl")
    models = [AutoModelForImageTextToText.from_pretrained(path).eval() for path in (base, tuned)]
    batches = batches_of(base, scenes, tokens="answer")
    differ, asked = changed(*models, batches)
    assert asked
    weight, _ = settled(*models, batches)
    assert weight == MEASURED_RETAIN * differ / asked
    labels = [
        {
            **{key: value for key, value in batch.items() if key != "token_mask"},
            "labels": torch.where(batch["token_mask"], batch["input_ids"], -100),
        }
        for batch in batches
    ]
    assert settled(*models, labels)[0] == weight
    save_batches(labels, tmp_path / "old.safetensors")
    report = patch_checkpoint(
        base,
        tuned,
        tmp_path / "out",
        Recipe(refits=0),
        calibration=write_scenes(tmp_path / "new.jsonl", seed=1),
        retain=tmp_path / "old.safetensors",
        options=OPTIONS,
    )
    assert noted(report).startswith(f"retain_weight {weight:.3g}: ")


def test_samples_without_answers_count_every_token(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=1)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, tuned)]
    data = tmp_path / "old.jsonl"
    lines = [{"prompt": "a b c d a"}, {"prompt": "b b c"}, {"prompt": "d c b a"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches = batches_of(base, data, tokens="asked")
    assert all("token_mask" not in batch for batch in batches)
    differ, asked = changed(*models, batches)
    assert settled(*models, batches)[0] == MEASURED_RETAIN * differ / asked


def test_the_decoder_of_two_is_asked(tmp_path: Path) -> None:
    model = t5()
    base, tuned = save_pair(tmp_path, model, moved(model), text_tokenizer())
    models = [AutoModelForSeq2SeqLM.from_pretrained(path).eval() for path in (base, tuned)]
    batches = batches_of(
        base, write_texts(tmp_path / "old.jsonl"), tokens="asked", config=models[0].config
    )
    differ, asked = changed(*models, batches, "decoder_")
    assert 0 < differ <= asked
    assert settled(*models, batches)[0] == MEASURED_RETAIN * differ / asked


def test_a_model_that_changed_nothing_is_not_held() -> None:
    base, _ = pair(Toy())
    weight, report = settled(base, base, token_batches())
    assert weight == 0
    assert "0.0% of" in noted(report)


class Headless(Toy):
    """It has no output head that it says."""

    def get_output_embeddings(self) -> None:
        return None


class Mute(Toy):
    """Its output head is not called."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        del attention_mask
        return self.layers[0](self.embed(input_ids)) @ self.head.weight.T


class Short(Toy):
    """It answers at its last place only."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        del attention_mask
        return self.head(self.layers[0](self.embed(input_ids))[:, -1:])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Headless(), "Headless has no output head"),
        (Mute(), "Mute does not call its output head"),
        (Short(), "the model answers at [4, 1] places for [4, 9] tokens"),
    ],
)
def test_what_cannot_be_asked_leaves_the_fixed_weight(model: Toy, why: str) -> None:
    weight, report = settled(*pair(model), token_batches())
    assert weight == DEFAULT_RETAIN
    assert noted(report) == f"retain_weight 0.1: not measured, {why}"


def test_batches_without_tokens_leave_the_fixed_weight() -> None:
    batches = [(batch["input_ids"],) for batch in token_batches()]
    base, tuned = pair(Toy())
    weight, report = settled(base, tuned, batches)
    assert weight == DEFAULT_RETAIN
    assert noted(report).endswith("not measured, a batch has no input_ids")
    one = [{"input_ids": torch.ones(2, 1, dtype=torch.int64)}]
    assert noted(settled(base, tuned, one)[1]).endswith("not measured, no answer token is known")


def test_a_weight_that_is_given_is_not_measured() -> None:
    base, tuned = pair(Toy())
    batches = token_batches()
    for recipe, open_ in ((Recipe(), True), (Recipe(retain_weight=0.2), False)):
        done = tailor_model(base, tuned, batches, recipe, retain_batches=token_batches(seed=5))
        assert any(note.startswith("retain_weight") for note in done.report.notes) is open_
