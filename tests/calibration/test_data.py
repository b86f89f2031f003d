"""Which tokens of a data file count, and what is said of data that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_fast._core.errors import InputError, TailorError
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.moments import BatchName, finite_tokens
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.statfile import open_statistics
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tests.patching.disk import llama_pair, llava_pair, write_scenes

LAYER = "model.layers.1.mlp.up_proj"


def lines(path: Path, *samples: Any) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def prompt(words: str, answer: str = "a b") -> dict[str, str]:
    return {"prompt": words, "answer": answer}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return llama_pair(tmp_path)


def sums(folder: Path, data: Path, tokens: Any) -> tuple[torch.Tensor, int]:
    """Sum of ``x xᵀ`` of one layer, and the counted tokens."""
    out = data.with_name(f"{tokens}.safetensors")
    report = calibrate(folder, data, out, options=RunOptions(batch_size=3, tokens=tokens))
    with open_statistics(out) as statistics:
        assert statistics.header.tokens == tokens
        moments = statistics.moments(LAYER, torch.device("cpu"))
    assert moments.tokens == report.tokens
    return moments.gram * moments.tokens, moments.tokens


def test_official_counts_padding_as_the_authors_script_does(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = lines(tmp_path / "new.jsonl", prompt("a b c d"), prompt("a"), prompt("b c"))
    real, counted = sums(pair[1], data, "all")
    with_padding, everything = sums(pair[1], data, "official")
    answers, behind = sums(pair[1], data, "answer")
    lengths = [1 + words + 2 + 1 for words in (4, 1, 2)]  # begin, prompt, answer, end
    assert counted == sum(lengths)
    assert everything == 3 * max(lengths)
    assert behind == 3 * 3
    # A sum of squares over more tokens is larger in every direction.
    assert torch.linalg.eigvalsh(with_padding - real).min() > -1e-3 * with_padding.trace()
    assert with_padding.trace() > real.trace() > answers.trace() > 0


def test_the_tokens_of_a_patch_are_those_of_the_option(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = lines(tmp_path / "new.jsonl", prompt("a b c d"), prompt("a"))
    counted = {}
    for tokens in ("all", "answer", "official"):
        options = RunOptions(tokens=tokens)
        report = patch_checkpoint(*pair, tmp_path / tokens, calibration=data, options=options)
        counted[tokens] = {row.tokens for row in report.linears}
    assert counted == {"all": {13}, "answer": {6}, "official": {16}}


def test_order_and_digest_do_not_depend_on_the_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = lines(tmp_path / "new.jsonl", *(prompt("a b c d"[: 1 + 2 * (i % 4)]) for i in range(9)))
    files = [tmp_path / f"{run}.safetensors" for run in range(2)]
    for file in files:
        calibrate(pair[1], data, file, options=RunOptions(samples=5, batch_size=2))
    assert files[0].read_bytes() == files[1].read_bytes()


def unusable(place: Path) -> dict[str, tuple[Any, dict[str, Any], str]]:
    """Data that no run can use: the lines, the options, what is said."""
    good = prompt("a b")
    (place / "broken.png").write_bytes(b"\x89PNG")
    seen = {"prompt": "<image> what 2", "answer": "3"}
    return {
        "no messages": ((good, {"text": "a"}), {}, r"line 2: expected 'messages' or 'prompt'; got"),
        "no picture": ((good, {**seen, "images": ["no.png"]}), {}, r"line 2: image 'no\.png' does"),
        "too long": (
            (good, prompt("a " * 20)),
            {"max_length": 9},
            r"line 2: has 24 tokens, the li",
        ),
        "no sample": ((), {}, "holds no sample; expected one JSON object a line"),
        "no image wanted": ((good, {**good, "images": ["broken.png"]}), {}, r"line 2: image .*bro"),
    }


@pytest.mark.parametrize(
    "name", ["no messages", "no picture", "too long", "no sample", "no image wanted"]
)
@pytest.mark.parametrize("run", [plan_patch, patch_checkpoint])
def test_unusable_data_is_found_by_the_plan_too(
    name: str, run: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    samples, options, message = unusable(tmp_path)[name]
    data = lines(tmp_path / "new.jsonl", *samples)
    good = lines(tmp_path / "good.jsonl", prompt("a"))
    out = tmp_path / "out"
    for given in ({"calibration": data}, {"calibration": good, "retain": data}):
        with pytest.raises(InputError, match=message) as error:
            run(*pair, out, options=RunOptions(**options), **given)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_token_without_an_embedding_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As where words were added to a tokenizer and the model was not resized."""
    for folder in pair:
        config = json.loads((folder / "tokenizer.json").read_text())
        word = {"id": 4711, "content": "new", "special": False, "single_word": True}
        word |= {"lstrip": False, "rstrip": False, "normalized": False}
        config["added_tokens"].append(word)
        (folder / "tokenizer.json").write_text(json.dumps(config))
    data = lines(tmp_path / "new.jsonl", prompt("a b c"), prompt("a new b"))
    for run in (patch_checkpoint, plan_patch):
        with pytest.raises(InputError, match=r"has token \d+; expected one of the \d+ that the mo"):
            run(*pair, tmp_path / "out", calibration=data)


@pytest.mark.parametrize("run", [plan_patch, patch_checkpoint])
def test_a_missing_processor_and_a_broken_picture_are_found(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    base, tuned = llava_pair(tmp_path)
    data = write_scenes(tmp_path / "new.jsonl")
    (tmp_path / "new-images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"line 4: image .*3\.png cannot be read"):
        run(base, tuned, tmp_path / "out", calibration=data)
    for path in (*tuned.glob("*processor*"), *tuned.glob("token*")):
        path.unlink()
    with pytest.raises(InputError, match=r"cannot be loaded: .*; put the checkpoint's"):
        run(base, tuned, tmp_path / "out", calibration=data)


def test_activations_that_are_not_finite_name_layer_and_sample(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = lines(tmp_path / "new.jsonl", prompt("a"), prompt("b"), prompt("a d"), prompt("c"))
    words = load_processor(pair[1])("d", add_special_tokens=False)["input_ids"]
    for path in pair[1].glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][words] = float("nan")
            save_file(tensors, path, {"format": "pt"})
    layer = r"^model\.layers\.0\.self_attn\.q_proj: the input in {} batch 1 is not finite at"
    sample = rf" token 2 of {tmp_path}/new\.jsonl line 3; expected finite activations"
    options = RunOptions(batch_size=2)
    with pytest.raises(TailorError, match=layer.format("tuned/new") + sample):
        patch_checkpoint(*pair, tmp_path / "out", calibration=data, options=options)
    for kind in ("full", "diag"):
        with pytest.raises(InputError, match=layer.format("model") + sample):
            calibrate(pair[1], data, tmp_path / "s.safetensors", kind=kind, options=options)


def test_the_place_of_a_number_that_is_not_finite() -> None:
    x = torch.zeros(2, 3, 4)
    x[1, 2, 0] = float("inf")
    named = BatchName("new batch 4")
    with pytest.raises(InputError, match="in new batch 4 is not finite at token 2 of sample 1;"):
        finite_tokens("up", x, named)
    named.samples = ("a line 1", "a line 9")
    with pytest.raises(InputError, match="token 2 of a line 9;"):
        finite_tokens("up", x, named)
    with pytest.raises(InputError, match="in somewhere is not finite at token 5;"):
        finite_tokens("up", x.view(6, 4), "somewhere")


def test_batches_know_their_samples(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = lines(tmp_path / "new.jsonl", prompt("a"), prompt("b"), prompt("c"))
    processor = load_processor(pair[1])
    batches = make_batches(read_samples(data), processor, batch_size=2, max_length=9)
    assert [batch.samples for batch in batches] == [
        (f"{data} line 1", f"{data} line 2"),
        (f"{data} line 3",),
    ]
    assert batches[0].to(torch.device("cpu")).samples == batches[0].samples
