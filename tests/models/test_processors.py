"""Loading a checkpoint's processor: from its own files, without network, or one clear sentence."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tailor_fast._core.errors import InputError
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import Sample
from tests.models.processors import llava_processor, text_tokenizer


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def saved(folder: Path, processor: Any) -> Path:
    processor.save_pretrained(folder)
    if not (folder / "config.json").exists():
        LlamaConfig().save_pretrained(folder)
    return folder


def test_a_text_checkpoint_gives_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_processor(saved(tmp_path, text_tokenizer()))
    assert tokenizer("a b")["input_ids"] == text_tokenizer()("a b")["input_ids"]


def test_a_multimodal_checkpoint_gives_its_processor(tmp_path: Path) -> None:
    processor = load_processor(saved(tmp_path, llava_processor()))
    assert processor.image_processor.size == {"height": 16, "width": 16}
    assert (
        processor.tokenizer("what 3")["input_ids"]
        == llava_processor().tokenizer("what 3").input_ids
    )


def test_a_tokenizer_without_padding_token_gets_one(tmp_path: Path) -> None:
    tokenizer = load_processor(saved(tmp_path, text_tokenizer(pad=None)))
    samples = [Sample(Path("d"), 1, prompt="a b"), Sample(Path("d"), 2, prompt="a")]
    (batch,) = make_batches(samples, tokenizer, batch_size=2, max_length=8)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_missing_directory_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: is no directory; expected a checkpoint with its"):
        load_processor(tmp_path / "none")
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"its tokenizer cannot be loaded: .*; put the checkpoint's"
    ):
        load_processor(tmp_path)


def test_a_processor_without_tokenizer_or_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    saved(pictures, llava_processor().image_processor)
    with pytest.raises(InputError, match="pictures: "):
        load_processor(pictures)
    code = saved(tmp_path / "code", llava_processor())
    config = json.loads((code / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "mine.Mine"}
    config["processor_class"] = "Mine"
    (code / "processor_config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(InputError, match="code: its processor cannot be loaded: "):
        load_processor(code)
