"""What a model gives the right answers: against plain forward passes, and the ratio's error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlamaModel,
)

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.prepared import save_batches
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.streamed import StreamedModel, skeleton_of
from tailor_fast.checkpoint import Checkpoint, Hashed, open_checkpoint
from tailor_fast.models import map_keys
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching.held_out import Answers, HeldOut
from tests.models.processors import t5, text_tokenizer
from tests.patching.disk import llama_pair, llava_pair, write_scenes, write_texts

OPTIONS = RunOptions(batch_size=16, samples=64)


def ask(
    model: Path, data: Path, options: RunOptions = OPTIONS, other: Path | None = None
) -> torch.Tensor:
    """Ask a model; then, with the same samples, ``other`` where it is given."""

    def opened(file: Checkpoint) -> StreamedModel:
        source = Hashed(file)
        keys = map_keys(skeleton_of(source), file.tensors, str(model))
        return StreamedModel(source, keys, torch.device("cpu"))

    with open_checkpoint(model) as one, open_checkpoint(other or model) as two:
        held = HeldOut(data, model, opened(one), options, data.parent)
        answers = [held.ask(opened(file)).right for file in (one, two)]
        assert held.samples == len(answers[0])
        return answers[1]


def plain(model: Any, batches: list[Any]) -> torch.Tensor:
    """The same from whole logits, batch by batch."""
    sums = []
    for batch in batches:
        inputs = dict(batch)
        mask = inputs.pop("token_mask")
        with torch.no_grad():
            words = model(**inputs, use_cache=False).logits.softmax(-1)
        ids = inputs["input_ids"]
        for row in range(len(ids)):
            places = [at for at in range(1, ids.shape[1]) if mask[row, at]]
            assert len(places) > 1  # the last one ends the answer
            found = [words[row, at - 1, ids[row, at]].double() for at in places[:-1]]
            sums.append(torch.stack(found).mean())
    return torch.stack(sums)


def batches_of(folder: Path, data: Path) -> list[Any]:
    held = read_samples(data, most=OPTIONS.samples, part="held")
    how = {"batch_size": 16, "max_length": 2048}
    return list(make_batches(held, load_processor(folder), tokens="answer", **how))


def test_a_text_model_is_asked_for_its_answers(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2)
    data = write_texts(tmp_path / "data.jsonl", 130)
    for folder, other in ((base, None), (base, tuned)):
        model = AutoModelForCausalLM.from_pretrained(other or folder).eval()
        expected = plain(model, batches_of(folder, data))
        torch.testing.assert_close(ask(folder, data, other=other), expected)
    assert expected.std() > 0


def test_prepared_batches_and_images_are_asked(tmp_path: Path) -> None:
    base, _ = llava_pair(tmp_path)
    data = write_scenes(tmp_path / "scenes.jsonl", 130)
    batches = batches_of(base, data)
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    expected = plain(model, batches)
    torch.testing.assert_close(ask(base, data), expected)
    save_batches([*batches, *batches], tmp_path / "data.safetensors")
    asked = ask(base, tmp_path / "data.safetensors")
    assert len(asked) >= 64
    assert set(asked.tolist()) <= set(ask(base, data).tolist())


def test_an_encoder_decoder_is_asked_for_what_its_decoder_reads(tmp_path: Path) -> None:
    model = t5()
    model.save_pretrained(tmp_path / "t5")
    text_tokenizer().save_pretrained(tmp_path / "t5")
    data = write_texts(tmp_path / "data.jsonl", 128)
    asked = ask(tmp_path / "t5", data)
    held = read_samples(data, most=64, part="held")
    processor = load_processor(tmp_path / "t5")
    (batch,) = make_batches(held[:1], processor, batch_size=1, max_length=99, config=model.config)
    with torch.no_grad():
        words = model(**batch).logits.softmax(-1)[0]
    ids = batch["decoder_input_ids"][0]
    found = [words[at - 1, ids[at]].double() for at in range(1, len(ids))]
    assert len(found) == 3  # <s>, which this tokenizer puts first, "a" and "b", not the end
    torch.testing.assert_close(asked[0], torch.stack(found).mean())


def test_an_answer_of_one_token_counts_whole(tmp_path: Path) -> None:
    """Prepared batches may have labels that leave the end out; no answer at all counts nothing."""
    base, _ = llama_pair(tmp_path, blocks=1)
    ids = torch.randint(3, 8, (32, 5), generator=torch.Generator().manual_seed(2))
    labels = torch.full_like(ids, -100)
    labels[1:, 3] = ids[1:, 3]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    save_batches([batch] * 4, tmp_path / "data.safetensors")
    with torch.no_grad():
        words = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits.softmax(-1)
    expected = words[torch.arange(32), 2, ids[:, 3]].double()
    expected[0] = 0.0
    asked = ask(base, tmp_path / "data.safetensors")
    torch.testing.assert_close(asked, torch.cat([expected] * (len(asked) // 32)))


def test_max_ram_bounds_what_waits_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = llama_pair(tmp_path, blocks=2)
    data = write_texts(tmp_path / "data.jsonl", 130)
    spills: list[ActivationSpill] = []
    close = ActivationSpill.close

    def noted(self: ActivationSpill) -> None:
        spills.append(self)
        close(self)

    monkeypatch.setattr(ActivationSpill, "close", noted)
    free = ask(base, data)
    assert not spills
    assert torch.equal(ask(base, data, replace(OPTIONS, max_ram=60_000)), free)
    assert spills[-1].spilled_bytes > 0
    with pytest.raises(UsageError, match="max_ram of 100 bytes is too little: the largest block"):
        ask(base, data, RunOptions(max_ram=100, samples=64))


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    base, _ = llama_pair(tmp_path, blocks=1)
    data = write_texts(tmp_path / "data.jsonl", 130)
    data.write_text(data.read_text().replace(', "answer": "a b"', ""))
    with pytest.raises(InputError, match="has no answer; tokens 'answer' needs one"):
        ask(base, data)
    nothing = Answers(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(InputError, match=r"gives the right answers .* no probability"):
        nothing.over(nothing)


def test_a_model_without_a_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = llama_pair(tmp_path, blocks=1)
    data = write_texts(tmp_path / "data.jsonl", 130)
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda _self: None)
    with pytest.raises(InputError, match="ForCausalLM has no output head; expected a model that"):
        ask(base, data)


def test_a_model_that_answers_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a head sees other places than tokens, what is asked for is not what it says."""
    base, _ = llama_pair(tmp_path, blocks=1)
    data = write_texts(tmp_path / "data.jsonl", 130)
    forward = LlamaModel.forward

    def shorter(self: Any, **inputs: Any) -> Any:
        found = forward(self, **inputs)
        found.last_hidden_state = found.last_hidden_state[:, 1:]
        return found

    monkeypatch.setattr(LlamaModel, "forward", shorter)
    with pytest.raises(InputError, match=r"data.jsonl: the model answers at .* places for .*; exp"):
        ask(base, data)


def test_the_error_of_a_ratio_is_that_of_drawing_again() -> None:
    """Against many draws of as many samples from one population."""
    generator = torch.Generator().manual_seed(3)
    base = 1 + torch.rand(200_000, dtype=torch.float64, generator=generator)
    kept = base * (0.9 + 0.1 * torch.rand(200_000, dtype=torch.float64, generator=generator))
    drawn = [slice(begin, begin + 100) for begin in range(0, 200_000, 100)]
    found = [Answers(kept[part]).over(Answers(base[part])) for part in drawn]
    ratios, errors = torch.tensor(found, dtype=torch.float64).T
    assert abs(ratios.mean() - 0.95) < 3e-4
    assert abs(errors.mean() / ratios.std() - 1) < 0.05
    assert Answers(base).over(Answers(base)) == (1.0, 0.0)
