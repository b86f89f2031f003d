"""A LLaVA of forty million parameters, made of transformers' own classes, and its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.quality import families, tinyllava
from benchmarks.quality.families import Family
from benchmarks.quality.large.scenes import GRID, NEW_TASKS, POSITIONS, SIDE
from benchmarks.quality.scenes import IMAGE_TAG, LETTERS, OLD_TASKS, Scenes
from benchmarks.quality.tinyllava import BOS, EOS, IMAGE, PAD, Batch

WORDS = (
    *("<pad>", "<bos>", "<eos>", IMAGE_TAG),
    *map(str, range(10)),
    *POSITIONS,
    *OLD_TASKS,
    *NEW_TASKS,
    *("all", "even", "odd", "left", "right", "same", "yes", "no"),
    *sorted(LETTERS),
)
IDS = {word: index for index, word in enumerate(WORDS)}
IMAGE_TOKENS = GRID * GRID
_MEAN, _STD = 0.3, 0.37  # of the scenes' pixels, rounded


@dataclass(frozen=True)
class Size:
    """Widths and depths.

    Attributes:
        vision: width and number of blocks of the vision tower.
        width: of the language model, a multiple of ``heads``.
        inner: of its MLPs.
        blocks: of it.
        heads: of it and of the vision tower.
    """

    vision: tuple[int, int] = (256, 4)
    width: int = 512
    inner: int = 1408
    blocks: int = 12
    heads: int = 8


def encode(scenes: Sequence[Scenes], device: torch.device) -> Batch:
    """Turn scenes into tensors: pixels float32 ``[n, 3, 32, 32]``, ids int64 ``[n, 19]``.

    Args:
        scenes: of tasks whose answers have the same number of words.
        device: of the tensors.
    """
    images = torch.from_numpy(np.concatenate([part.images for part in scenes])).to(device)
    pixels = ((images.float() * (1 / 255) - _MEAN) / _STD)[:, None].expand(-1, 3, -1, -1)
    head = [BOS] + [IMAGE] * IMAGE_TOKENS
    prompts = [[*head, *_ids(prompt)] for part in scenes for prompt in part.prompts]
    answers = [[*_ids(answer), EOS] for part in scenes for answer in part.answers]
    return Batch(
        pixels.contiguous(),
        torch.tensor(prompts, device=device),
        torch.tensor(answers, device=device),
    )


def family_of(size: Size) -> Family:
    """The family whose models have that size; they are made and read on the CPU."""
    llava = families.FAMILIES["llava"]
    return Family(
        new_model=partial(_new_model, size),
        save=_save,
        load=_load,
        tuned=llava.tuned,
        blocks=llava.blocks,
        extra=llava.extra,
    )


def _new_model(size: Size, seed: int) -> Any:
    width, blocks = size.vision
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=blocks,
            num_attention_heads=size.heads,
            image_size=SIDE,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.blocks,
            num_attention_heads=size.heads,
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()


def _save(model: Any, folder: Path) -> None:
    with tinyllava.quiet():
        model.save_pretrained(folder)


def _load(folder: Path) -> Any:
    with tinyllava.quiet():
        return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def _ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]
