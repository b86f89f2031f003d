"""Pairs of checkpoints on disk, a few kilobytes each, in the layouts that transformers writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import tinyllava
from tests.models.processors import WORDS, text_tokenizer


def llama(blocks: int = 3, width: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    """A LLaMA of ``blocks`` layers with random weights."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        initializer_range=0.1,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def moved(model: Any, names: tuple[str, ...] = ("",), scale: float = 0.2) -> Any:
    """A copy whose parameters with one of ``names`` in their name have moved."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(part in name for part in names):
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * step * parameter.float().std()).to(parameter.dtype))
    return tuned


def save_pair(
    folder: Path, base: Any, tuned: Any, processor: Any, shard: str = "20KB"
) -> tuple[Path, Path]:
    """Write both models with their processor."""
    paths = folder / "base", folder / "tuned"
    for path, model in zip(paths, (base, tuned), strict=True):
        model.save_pretrained(path, max_shard_size=shard)
        processor.save_pretrained(path)
    return paths


def llama_pair(folder: Path, **options: Any) -> tuple[Path, Path]:
    """A LLaMA pair with a word-level tokenizer."""
    base = llama(**options)
    return save_pair(folder, base, moved(base), text_tokenizer())


def llava_pair(folder: Path) -> tuple[Path, Path]:
    """A LLaVA pair; the language model and the projector have moved, as in fine-tuning."""
    base = tinyllava.new_model(6)
    tuned = moved(base, ("language_model", "projector"))
    return save_pair(folder, base, tuned, tinyllava.new_processor(), shard="200KB")


def write_texts(path: Path, count: int = 12, seed: int = 7) -> Path:
    """Prompts and answers of the word-level tokenizer, of different lengths."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            prompt = " ".join(generator.choice(list("abcd"), generator.integers(2, 9)))
            file.write(json.dumps({"prompt": prompt, "answer": "a b"}) + "\n")
    return path


def write_scenes(path: Path, count: int = 10, seed: int = 8) -> Path:
    """Prompts with a picture each for the LLaVA pair."""
    generator = np.random.default_rng(seed)
    images = path.parent / f"{path.stem}-images"
    images.mkdir()
    with path.open("w") as file:
        for index in range(count):
            pixels = generator.integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{index}.png")
            line = {
                "prompt": "<image> what 2",
                "answer": str(generator.integers(10)),
                "images": [f"{images.name}/{index}.png"],
            }
            file.write(json.dumps(line) + "\n")
    return path
