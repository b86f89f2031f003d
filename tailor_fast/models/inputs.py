"""Calibration samples through the checkpoint's own processor, as batches that the model takes.

Nothing is truncated and nothing is fetched. Padding stands on the right, so that the positions that
a model counts by itself are the true ones; the attention mask is always part of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.models.encoding import (
    FROM_THE_LEFT,
    Encoder,
    InputBatch,
    ModelInfo,
    NamedBatch,
    cast,
)
from tailor_fast.models.samples import Sample, hash_samples, read_samples
from tailor_fast.models.texts import REFUSALS, Renderer, Text, first_line, tokenizer_of
from tailor_fast.models.tokens import TOKEN_MASK

__all__ = [
    "InputBatch",
    "PromptBatch",
    "hash_samples",
    "load_processor",
    "make_batches",
    "make_prompts",
    "read_samples",
]

Tokens = Literal["all", "answer", "official", "asked"]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(directory: Path) -> Any:
    """Load a checkpoint's processor, or its tokenizer when it is text only; no network, no code.

    Args:
        directory: checkpoint directory with the files of the processor or tokenizer.

    Returns:
        transformers' processor or tokenizer; it has a padding token.

    Raises:
        InputError: the directory has neither, or they cannot be loaded.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if not directory.is_dir():
        raise InputError(f"{directory}: is no directory; expected a checkpoint with its processor")
    multimodal = any((directory / name).is_file() for name in _PROCESSOR_FILES)
    what, auto = ("processor", AutoProcessor) if multimodal else ("tokenizer", AutoTokenizer)
    try:
        processor = auto.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (*REFUSALS, ImportError) as error:
        raise InputError(
            f"{directory}: its {what} cannot be loaded: {first_line(error)}; put the checkpoint's"
            f" {what} files there"
        ) from error
    tokenizer = tokenizer_of(processor)
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise InputError(
            f"{directory}: has no tokenizer; put the checkpoint's tokenizer files there"
        )
    if tokenizer.pad_token is None:
        # Masked wherever it stands, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return processor


def make_batches(
    samples: Sequence[Sample],
    processor: Any,
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype | None = None,
    tokens: Tokens = "all",
    config: Any = None,
    share: Callable[[int], slice] = slice,
) -> list[NamedBatch]:
    """Turn samples into the keyword arguments of the model's forward pass.

    The text is the rendered chat template, or prompt and answer joined by a space and ended by the
    end token; the answer is part of it, as in training. A Q-Former reads the prompt alone; an
    encoder-decoder reads the prompt, its decoder the answer. Only samples that one call can take
    share a batch: all with images or all without, and equally long where padding would stand in a
    Q-Former or an encoder. Batches are in the order of their first samples.

    Args:
        samples: what ``read_samples`` returned.
        processor: what ``load_processor`` returned, or the like.
        batch_size: samples of a batch, at most.
        max_length: tokens of a sample, at most, the images' among them.
        dtype: dtype of pixel values and other floating inputs; None leaves the processor's.
        tokens: ``"answer"`` adds ``token_mask`` (bool ``[batch, length]``), True where an answer
            stands, so that nothing else is counted; ``"official"`` a mask that is True everywhere:
            the authors' script counts padding. ``"asked"`` is ``"answer"`` for the batches whose
            samples all have an answer before which text stands, ``"all"`` for others.
        config: the model's configuration, which says how many positions it has and whether it is an
            encoder-decoder; None for a decoder without a limit.
        share: which of how many batches are made; ``slice`` itself makes all.

    Returns:
        Batches with ``input_ids`` and ``attention_mask`` (int64 ``[batch, length]``) and what else
        the processor gives.

    Raises:
        InputError: no samples, a sample is too long or not taken by the processor, an image cannot
            be read, or there is no template for a chat; the message names the line.
        UsageError: ``tokens="answer"`` for an encoder-decoder.
    """
    if not samples:
        raise InputError("there are no samples; expected at least one")
    model = ModelInfo.of(config)
    if tokens == "answer" and model.encoder_decoder:
        raise UsageError(
            "tokens 'answer' is for decoders; the model is an encoder-decoder, whose decoder reads"
            " nothing but the answer; use tokens 'all'"
        )
    renderer = Renderer(processor, encoder_decoder=model.encoder_decoder)
    encoder = Encoder(processor, model, max_length)
    batches = []
    parts = _parts([renderer.render(sample) for sample in samples], batch_size)
    for part in parts[share(len(parts))]:
        batch = encoder.encode(part)
        asked = tokens == "asked" and not model.encoder_decoder
        if tokens == "answer" or (asked and all(text.answer for text in part)):
            rows = zip(part, batch["input_ids"], strict=True)
            batch[TOKEN_MASK] = torch.stack(
                [_answer_mask(text, ids, renderer, encoder) for text, ids in rows]
            )
        elif tokens == "official":
            batch[TOKEN_MASK] = torch.ones_like(batch["attention_mask"], dtype=torch.bool)
        batches.append(NamedBatch({key: cast(value, dtype) for key, value in batch.items()}))
        batches[-1].samples = tuple(text.sample.where for text in part)
    return batches


@dataclass(frozen=True)
class PromptBatch:
    """Samples whose prompts one call of ``generate`` can take.

    Attributes:
        places: their places among all samples.
        encode: makes the keyword arguments; images are read when it is called, not before.
    """

    places: tuple[int, ...]
    encode: Callable[[], InputBatch]


def make_prompts(
    samples: Sequence[Sample],
    processor: Any,
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype | None = None,
    config: Any = None,
) -> list[PromptBatch]:
    """Turn samples into what ``generate`` continues: as ``make_batches``, without the last answers.

    Padding stands on the left, where a decoder does not meet it on its way on.

    Args:
        samples: as the other arguments, see ``make_batches``.
        processor: same.
        batch_size: same.
        max_length: same.
        dtype: same.
        config: same.

    Raises:
        InputError: as ``make_batches``; what is wrong with images when a batch is encoded.
    """
    model = ModelInfo.of(config)
    renderer = Renderer(processor, encoder_decoder=model.encoder_decoder)
    encoder = Encoder(processor, model, max_length, FROM_THE_LEFT)
    texts = [renderer.render(sample) for sample in samples]
    places = {id(text): place for place, text in enumerate(texts)}

    def batch(part: Sequence[Text]) -> InputBatch:
        read = encoder.read([replace(text, text=text.prompt) for text in part])
        return {key: cast(value, dtype) for key, value in read.items()}

    return [
        PromptBatch(tuple(places[id(text)] for text in part), partial(batch, part))
        for part in _parts(texts, batch_size)
    ]


def _parts(texts: Sequence[Text], size: int) -> list[list[Text]]:
    """Cut into batches of one kind each, in the order of their first members."""
    parts: list[list[Text]] = []
    filling: dict[tuple[object, ...], list[Text]] = {}
    for text in texts:
        part = filling.get(text.kind)
        if part is None or len(part) == size:
            part = filling[text.kind] = []
            parts.append(part)
        part.append(text)
    return parts


def _answer_mask(
    text: Text, ids: torch.Tensor, renderer: Renderer, encoder: Encoder
) -> torch.Tensor:
    """Bool ``[length]``, True from where ``ids`` leaves the text before an answer to its end."""
    if not text.answer:
        raise InputError(f"{text.sample.where}: has no answer; tokens 'answer' needs one")
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for before, upto in renderer.turns(text):
        begin, end = (
            _common(encoder.process([head])["input_ids"][0], ids) for head in (before, upto)
        )
        mask[begin:end] = True
    return mask


def _common(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many of the first tokens are equal."""
    length = min(len(ours), len(theirs))
    differ = (ours[:length] != theirs[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
