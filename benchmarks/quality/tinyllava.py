"""A LLaVA of half a million parameters, made of transformers' own classes.

CLIP vision tower, two-layer projector, LLaMA decoder, a word-level tokenizer and CLIP's image
processor: ``AutoProcessor`` and ``LlavaForConditionalGeneration.from_pretrained`` read it as they
read a large one. A scene of 16x16 pixels is four image tokens.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from benchmarks.quality.scenes import (
    IMAGE_TAG,
    LATER_TASKS,
    LETTERS,
    NEW_TASKS,
    OLD_TASKS,
    SIDE,
    Scenes,
)

PAD, BOS, EOS, IMAGE = range(4)
WORDS = (
    *("<pad>", "<bos>", "<eos>", IMAGE_TAG, "<unk>"),
    *map(str, range(10)),
    *OLD_TASKS,
    *NEW_TASKS,
    *("all", "even", "odd", "left", "right", "same", "yes", "no"),
    *sorted(LETTERS),
    *LATER_TASKS,
)
IDS = {word: index for index, word in enumerate(WORDS)}
IMAGE_TOKENS = 4
PROMPT_LENGTH = 1 + IMAGE_TOKENS + 2  # <bos>, the image, two words
SHARD_BYTES = 600_000  # four shards and an index: the layout of a large checkpoint

_PATCH = 8
INITIALIZER_RANGE = 0.05
# The vision tower of every kind of model here, whichever class reads it.
VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": _PATCH,
    "initializer_range": INITIALIZER_RANGE,
}
_MEAN, _STD = 0.3, 0.37  # of the scenes' pixels, rounded


class Batch(NamedTuple):
    """Model inputs of n scenes.

    Attributes:
        pixel_values: float32 [n, 3, 16, 16], normalised.
        input_ids: int64 [n, 7], ``<bos>``, four image tokens, the two words of the prompt.
        answer_ids: int64 [n, words of the answer + 1], the last one is ``<eos>``.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    answer_ids: torch.Tensor


def encode(scenes: Sequence[Scenes]) -> Batch:
    """Turn scenes into tensors without a file or a processor in between.

    The pixels and ids are those that ``new_processor()`` gives for the same PNG file and text, bit
    for bit.

    Args:
        scenes: of tasks whose answers have the same number of words.
    """
    pixels = torch.from_numpy(np.concatenate([part.images for part in scenes]))
    # The processor scales in float64 and does the rest in float32.
    scaled = (pixels.double() * (1 / 255)).float()
    normalised = (scaled - _MEAN) / _STD
    head = [BOS] + [IMAGE] * IMAGE_TOKENS
    prompts = [[*head, *_ids(prompt)] for part in scenes for prompt in part.prompts]
    answers = [[*_ids(answer), EOS] for part in scenes for answer in part.answers]
    colours = normalised[:, None].repeat(1, 3, 1, 1)
    return Batch(colours, torch.tensor(prompts), torch.tensor(answers))


def new_processor() -> Any:
    """Return a ``LlavaProcessor``: tokenizer and image processor, both saved with the model."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    # Digits stand alone, as in LLaMA's own tokenizer.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TAG},
        padding_side="left",
        model_max_length=64,
    )
    # The PIL class: it works without torchvision, and either backend can read what it saves.
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[_MEAN] * 3,
        image_std=[_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=wrapped,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
    )


def text_config(width: int, layers: int) -> LlamaConfig:
    """Return the language model's configuration, which every kind of model here shares.

    Args:
        width: hidden size, a multiple of 4.
        layers: its blocks.
    """
    return LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def new_model(seed: int, *, width: int = 96, layers: int = 4) -> Any:
    """Return an untrained ``LlavaForConditionalGeneration`` in float32.

    Args:
        seed: of the weights.
        width: hidden size of the language model, a multiple of 4; the defaults make 477,216
            parameters.
        layers: its blocks.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config(width, layers),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_new_tokens=5,
        # A merged model may emit the image token, and generation then fails on the missing image.
        suppress_tokens=[IMAGE],
    )
    return model.eval()


def save(model: Any, folder: Path) -> None:
    """Write the model, in float32 and several shards, and its processor to ``folder``."""
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        new_processor().save_pretrained(folder)


def load(folder: Path) -> Any:
    """Read a model back by ``from_pretrained``, ready for generation."""
    with quiet():
        return LlavaForConditionalGeneration.from_pretrained(folder).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch transformers' progress bars off: models of this size load in milliseconds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]
