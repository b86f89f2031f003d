"""One forward pass says what greedy generation answers, for every kind of model."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality import evaluation, scenes, tinyblip, tinyllava
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.tinyllava import Batch
from benchmarks.quality.training import Pair


def _batch(task: str = "list", count: int = 12) -> Batch:
    return tinyllava.encode([scenes.draw(task, "test", count, 0)])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_generation_says_is_right_and_nothing_else(name: str) -> None:
    family = FAMILIES[name]
    model = family.new_model(seed=1)
    batch = _batch()
    said = model.generate(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        attention_mask=torch.ones_like(batch.input_ids),
        **family.extra(batch.input_ids),
        max_new_tokens=batch.answer_ids.shape[1],
        do_sample=False,
        eos_token_id=None,
    )[:, -batch.answer_ids.shape[1] :]
    told = batch._replace(answer_ids=said.clone())
    assert family.right(model, told).all()
    told.answer_ids[3, -1] = (told.answer_ids[3, -1] + 1) % 40
    assert family.right(model, told).tolist() == [row != 3 for row in range(12)]


def test_a_trained_model_scores_the_same_both_ways(pair: Pair) -> None:
    model = tinyllava.load(pair.tuned.folder)
    for task in ("next", "what"):
        right = FAMILIES["llava"].right(model, _batch(task, 200))
        expected = evaluation.accuracy(model, task, "test", 200, seed=0)
        assert 100 * right.double().mean().item() == pytest.approx(expected)


def test_the_answer_does_not_see_itself() -> None:
    family = FAMILIES["instructblip"]
    model = family.new_model(seed=1)
    batch = _batch()
    with torch.no_grad():
        logits = family.answer_logits(model, batch)
        other = batch._replace(answer_ids=(batch.answer_ids + 5) % 30)
        changed = family.answer_logits(model, other)
    assert torch.equal(logits[:, 0], changed[:, 0])
    assert not torch.equal(logits[:, 1], changed[:, 1])


def test_the_qformer_reads_the_question() -> None:
    batch = _batch("what")
    words = [[tinyllava.WORDS[at] for at in row] for row in tinyblip.question_ids(batch.input_ids)]
    assert [" ".join(row) for row in words] == scenes.draw("what", "test", 12, 0).prompts


def test_every_kind_of_model_has_one_vision_tower_and_one_kind_of_decoder() -> None:
    """What the kinds share is made in one place; sizes as the pages about them say."""
    configs = {name: family.new_model(seed=1).config for name, family in FAMILIES.items()}
    for config in configs.values():
        vision = config.vision_config
        assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (64, 2, 8)
        assert config.text_config.vocab_size == 64
        assert config.text_config.intermediate_size == 2 * config.text_config.hidden_size
    sizes = {
        name: (config.text_config.hidden_size, config.text_config.num_hidden_layers)
        for name, config in configs.items()
    }
    assert sizes == {"llava": (96, 4), "llava-wide": (128, 6), "instructblip": (96, 3)}


def test_queries_start_apart(tmp_path: Path) -> None:
    model = tinyblip.new_model(seed=1)
    assert torch.cdist(model.query_tokens[0], model.query_tokens[0]).add(torch.eye(4)).min() > 0.5
    tinyblip.save(model, tmp_path / "blip")
    again = tinyblip.load(tmp_path / "blip").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "layers", "parts"),
    [
        ("llava", 2, {"model.language_model.layers.2", "model.language_model.layers.3"}),
        ("instructblip", 1, {"qformer.encoder.layer.3"}),
        ("instructblip", 4, {"qformer"}),
    ],
)
def test_the_last_layers_and_the_projection_are_tuned(
    name: str, layers: int, parts: set[str]
) -> None:
    family = FAMILIES[name]
    model = family.new_model(seed=1)
    tuned = {id(parameter) for parameter in family.tuned(model, layers)}
    parts |= {"model.multi_modal_projector", "language_projection"}
    for path, parameter in model.named_parameters():
        expected = any(f"{path}.".startswith(f"{part}.") for part in parts)
        assert (id(parameter) in tuned) == expected, path
    assert family.blocks(model) == 4
