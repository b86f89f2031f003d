"""Prepared batches from a file: the same as in memory, and what is said of those that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_fast import save_batches
from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.data import hash_data
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.statfile import open_statistics
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching.checkpoints import Recipe, patch_checkpoint, plan_patch
from tests.models.zoo import FAMILIES, save_family
from tests.patching.disk import llama_pair, write_texts

Batch = dict[str, torch.Tensor]
LAYER = "model.layers.0.mlp.up_proj"


def batch(rows: int = 1, length: int = 5, **more: torch.Tensor) -> Batch:
    ids = 3 + torch.arange(rows * length).reshape(rows, length) % 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return llama_pair(tmp_path)


def test_batches_of_the_processor_give_the_words_of_the_samples(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_texts(tmp_path / "new.jsonl", count=6)
    made = make_batches(read_samples(data), load_processor(pair[1]), batch_size=2, max_length=64)
    folder = tmp_path / "prepared"
    folder.mkdir()
    save_batches(made[:1], folder / "a.safetensors")
    save_batches(made[1:], folder / "b.safetensors")
    options = RunOptions(batch_size=2)
    recipe = Recipe(retain_weight=0.1)  # answers, by which it is measured, are marked in one only
    given = {"calibration": data, "retain": data}
    patch_checkpoint(*pair, tmp_path / "lines", recipe, **given, options=options)
    given = {"calibration": folder, "retain": folder}
    plan_patch(*pair, tmp_path / "out", recipe, **given)
    patch_checkpoint(*pair, tmp_path / "out", recipe, **given)
    for file in (tmp_path / "lines").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def counted(model: Path, data: Path, **options: Any) -> tuple[int, str, int, tuple[str, ...]]:
    """Counted tokens of one layer, digest and samples as the file has them, and the notes."""
    out = data.parent / "sums.safetensors"
    report = calibrate(model, data, out, options=RunOptions(overwrite=True, **options))
    with open_statistics(out) as statistics:
        header = statistics.header
        moments = statistics.moments(LAYER, torch.device("cpu"))
    return moments.tokens, header.data_sha256, header.samples, report.notes


def test_which_tokens_and_samples_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "new.safetensors"
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 2)
    labels = torch.tensor([[-100, -100, 4, 5, 6]] * 2)  # one of them at padding
    save_batches(
        [{**batch(2, attention_mask=mask, labels=labels)}, *[batch(2, labels=labels)] * 3], data
    )
    tokens, digest, samples, notes = counted(pair[1], data)
    assert (tokens, digest, samples, notes) == (8 + 3 * 10, hash_data(data, None), 8, ())
    assert counted(pair[1], data, tokens="answer")[0] == 4 + 3 * 6
    assert counted(pair[1], data, tokens="official")[0] == 40
    tokens, part, samples, notes = counted(pair[1], data, samples=5)
    assert (tokens, samples) == (8 + 10, 4)
    assert notes == ("new.safetensors: 4 of 8 samples are used, evenly spaced",)
    assert part == hash_data(data, 5) != digest
    words = load_file(data)
    words["000002.input_ids"][0, 0] += 1  # the second batch of the two that are used
    save_file(words, data)
    assert hash_data(data, 5) != part
    masked = [{**batch(labels=labels[:1]), "token_mask": torch.tensor([[0, 1, 1, 1, 1]])}]
    save_batches(masked, data, overwrite=True)
    assert counted(pair[1], data, tokens="answer")[0] == 4


def changed(**values: Any) -> Callable[[Path], None]:
    """Writes one batch as a file, in which the tensors called so are others, or none."""

    def write(path: Path) -> None:
        tensors = {**batch(2), **values}
        kept = {key: value for key, value in tensors.items() if value is not None}
        save_file({f"000000.{key}": value for key, value in kept.items()}, path)

    return write


def named(*names: str) -> Callable[[Path], None]:
    return lambda path: save_file(
        {name: torch.ones(1, 2, dtype=torch.int64) for name in names}, path
    )


IDS = batch(2)["input_ids"]
UNUSABLE: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "no mask": (changed(attention_mask=None), {}, "batch 0: has no attention_mask; expected it in"),
    "no ids": (changed(input_ids=None), {}, r"has no tensor '000000\.input_ids'; expected batches"),
    "other name": (named("000000.input_ids", "labels"), {}, "'labels' is no '000000.input_ids'"),
    "twice": (named("000000.input_ids", "0000000.input_ids"), {}, "'0000000.input_ids' is no '00"),
    "gap": (named("000001.input_ids"), {}, r"has no tensor '000000\.input_ids'"),
    "mask's shape": (
        changed(attention_mask=IDS[:, 1:].contiguous()),
        {},
        r"attention_mask is .* \[2, 4\]; exp",
    ),
    "mask's values": (changed(attention_mask=2 * IDS), {}, "other values than 0 and 1"),
    "vectors": (changed(input_ids=IDS[0]), {}, r"input_ids is torch\.int64 \[5\]; expected integ"),
    "floats": (changed(labels=IDS.float()), {}, r"labels is torch\.float32 \[2, 5\]; expected int"),
    "unknown word": (changed(input_ids=IDS + 90), {}, "input_ids has 96; expected 0 to 9, the mod"),
    "negative word": (changed(input_ids=IDS - 9), {}, "input_ids has -6; expected 0 to 9"),
    "too long": (changed(), {"max_length": 4}, "a sample of 5 tokens, the limit is 4; shorten it"),
    "too many": (changed(), {"samples": 1}, "has 2 samples, the limit for all batches is 1; write"),
    "no answer": (changed(), {"tokens": "answer"}, "has neither token_mask nor labels; tokens 'an"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("run", [plan_patch, patch_checkpoint])
def test_unusable_batches_are_found_by_the_plan_too(
    name: str, run: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    write, options, message = UNUSABLE[name]
    data = tmp_path / "new.safetensors"
    write(data)
    with pytest.raises(InputError, match=message) as error:
        run(*pair, tmp_path / "out", calibration=data, options=RunOptions(**options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_data_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(InputError, match=r"empty: holds no \.safetensors file; expected batches"):
        plan_patch(*pair, tmp_path / "out", calibration=folder)
    data = write_texts(tmp_path / "new.jsonl", count=2)
    statistics = tmp_path / "sums.safetensors"
    calibrate(pair[1], data, statistics)
    with pytest.raises(InputError, match=r"tensor 'g0\.\w+' is no '000000\.input_ids'; expected"):
        plan_patch(*pair, tmp_path / "out", calibration=statistics)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(statistics.read_bytes()[:100])
    with pytest.raises(InputError, match=r"torn\.safetensors"):
        plan_patch(*pair, tmp_path / "out", calibration=data, retain=torn)


def test_an_input_that_the_model_does_not_have(tmp_path: Path) -> None:
    base, tuned, _ = save_family(FAMILIES["gpt2"], tmp_path)
    data = tmp_path / "new.safetensors"
    save_batches([batch(pixel_values=torch.ones(1, 3))], data)
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no input pixel_values; expected"):
        plan_patch(base, tuned, tmp_path / "out", calibration=data)


def test_an_encoder_decoder_has_no_answers_to_mask(tmp_path: Path) -> None:
    base, tuned, _ = save_family(FAMILIES["t5"], tmp_path)
    data = tmp_path / "new.safetensors"
    save_batches([batch(labels=IDS[:1])], data)
    with pytest.raises(UsageError, match="tokens 'answer' is for decoders; the model is an encod"):
        plan_patch(
            base, tuned, tmp_path / "out", calibration=data, options=RunOptions(tokens="answer")
        )


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    for batches, message in (
        ([], "there is no batch; expected at least one"),
        ([batch(), {"input_ids": IDS}], "batch 1: has no attention_mask"),
        ([batch(names=["a"])], "batch 0: names is a list; expected tensors only; leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            save_batches(batches, out)
        assert not out.exists()
    with pytest.raises(UsageError, match=r"expected a name that ends in \.safetensors"):
        save_batches([batch()], tmp_path / "new.bin")
    save_batches([batch()], out)
    with pytest.raises(OutputError, match="exists"):
        save_batches([batch()], out)
    save_batches([batch(2)], out, overwrite=True)
    assert load_file(out)["000000.input_ids"].shape == (2, 5)
