"""The model is one that transformers reads, and the tensors are those of its processor."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging

from benchmarks.quality import scenes, tinyllava
from benchmarks.quality.scenes import LATER_TASKS, NEW_TASKS, OLD_TASKS

TASKS = (*OLD_TASKS, *NEW_TASKS, *LATER_TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    tinyllava.save(tinyllava.new_model(seed=0), path)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_tensors_equal_the_processors(folder: Path, tmp_path: Path, task: str) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    drawn = scenes.draw(task, "test", 50, 0)
    scenes.write([drawn], tmp_path / "data.jsonl")
    text = (tmp_path / "data.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    inputs = processor(
        text=[line["prompt"] for line in lines],
        images=[Image.open(tmp_path / line["images"][0]) for line in lines],
        return_tensors="pt",
    )
    batch = tinyllava.encode([drawn])
    assert torch.equal(batch.pixel_values, inputs["pixel_values"])
    assert torch.equal(batch.input_ids, inputs["input_ids"])
    assert bool(inputs["attention_mask"].all())
    answers = [f"{line['answer']} <eos>" for line in lines]
    ids = processor.tokenizer(answers, add_special_tokens=False, return_tensors="pt")
    assert torch.equal(batch.answer_ids, ids["input_ids"])


def test_tasks_share_a_batch_in_order() -> None:
    parts = [scenes.draw(task, "train", 3, 0) for task in ("what", "parity")]
    together, first, second = (tinyllava.encode(part) for part in (parts, parts[:1], parts[1:]))
    for name in tinyllava.Batch._fields:
        apart = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(together, name), apart)


def test_digits_are_tokens_of_their_own(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    words = tokenizer.convert_ids_to_tokens(tokenizer("list all40h sum")["input_ids"])
    assert words == ["<bos>", "list", "all", "4", "0", "h", "<unk>"]


def test_the_checkpoint_is_a_sharded_one(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 4
    before, after = tinyllava.new_model(seed=0), tinyllava.load(folder)
    assert sum(weight.numel() for weight in after.parameters()) == 477_216
    state = after.state_dict()
    for name, weight in before.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, state[name]), name


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tinyllava.new_model(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_image_token_is_never_generated(folder: Path) -> None:
    model = tinyllava.load(folder)
    batch = tinyllava.encode([scenes.draw("what", "test", 2, 0)])
    hidden = model.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values)
    with torch.no_grad():  # the image token's logit is by far the largest
        model.lm_head.weight.zero_()
        model.lm_head.weight[tinyllava.IMAGE] = hidden.last_hidden_state[:, -1].mean(0)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
    logits = model(**inputs).logits[:, -1]
    assert (logits.argmax(-1) == tinyllava.IMAGE).all()
    generated = model.generate(**inputs, attention_mask=torch.ones_like(batch.input_ids))
    assert not (generated[:, tinyllava.PROMPT_LENGTH :] == tinyllava.IMAGE).any()


def test_progress_bars_are_left_as_they_were(folder: Path) -> None:
    assert logging.is_progress_bar_enabled()
    tinyllava.load(folder)
    assert logging.is_progress_bar_enabled()
