"""Texts and a word-level tokenizer for the models of ``benchmarks.pairs``, which have no words."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_WORDS = 8000


def write_tokenizer(folder: Path) -> None:
    """Put a tokenizer of numbered words beside a model."""
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    ids |= {f"w{number}": number + len(ids) for number in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
    ).save_pretrained(folder)


def write_texts(path: Path, samples: int, length: int, seed: int = 0) -> Path:
    """Samples of ``length`` tokens each, of random words."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(samples):
            words = [f"w{number}" for number in generator.integers(0, _WORDS, length - 1)]
            line = {"prompt": " ".join(words[:-1]), "answer": words[-1]}
            file.write(json.dumps(line) + "\n")
    return path
