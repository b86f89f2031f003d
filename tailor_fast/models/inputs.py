"""Calibration samples through the checkpoint's own processor, as batches that the model takes.

Nothing is truncated and nothing is fetched. Padding stands on the right, so that the positions that
a model counts by itself are the true ones; the attention mask is always part of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.models.samples import Sample, hash_samples, read_samples
from tailor_fast.models.texts import REFUSALS, Renderer, Text, first_line, tokenizer_of
from tailor_fast.models.tokens import TOKEN_MASK

__all__ = ["InputBatch", "hash_samples", "load_processor", "make_batches", "read_samples"]

Tokens = Literal["all", "answer"]
InputBatch = dict[str, torch.Tensor]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PADDING = {"padding": True, "padding_side": "right", "return_attention_mask": True}


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
) -> list[InputBatch]:
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
            stands, so that nothing else is counted.
        config: the model's configuration, which says how many positions it has and whether it is an
            encoder-decoder; None for a decoder without a limit.

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
    model = _Model.of(config)
    if tokens == "answer" and model.encoder_decoder:
        raise UsageError(
            "tokens 'answer' is for decoders; the model is an encoder-decoder, whose decoder reads"
            " nothing but the answer; use tokens 'all'"
        )
    renderer = Renderer(processor, encoder_decoder=model.encoder_decoder)
    encoder = _Encoder(processor, model, max_length)
    batches = []
    for part in _parts([renderer.render(sample) for sample in samples], batch_size):
        batch = encoder.encode(part)
        if tokens == "answer":
            rows = zip(part, batch["input_ids"], strict=True)
            batch[TOKEN_MASK] = torch.stack(
                [_answer_mask(text, ids, renderer, encoder) for text, ids in rows]
            )
        batches.append({key: _cast(value, dtype) for key, value in batch.items()})
    return batches


@dataclass(frozen=True)
class _Model:
    """What of the configuration matters here."""

    positions: int | None = None
    encoder_decoder: bool = False
    decoder_start: int | None = None

    @classmethod
    def of(cls, config: Any) -> _Model:
        if config is None:
            return cls()
        text = config.get_text_config()
        return cls(
            getattr(text, "max_position_embeddings", None),
            bool(text.is_encoder_decoder),
            getattr(text, "decoder_start_token_id", None),
        )


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


class _Encoder:
    """Texts and images to tensors, by one processor for one model."""

    def __init__(self, processor: Any, model: _Model, max_length: int) -> None:
        self._processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._qformer = getattr(processor, "qformer_tokenizer", None)
        self._model = model
        self._max_length = max_length

    def encode(self, texts: Sequence[Text]) -> InputBatch:
        """Turn texts of one kind into one batch."""
        batch = self.process(texts)
        self._check_lengths(texts, batch["attention_mask"])
        if self._qformer is not None:
            prompts = self._qformer(
                [text.prompt for text in texts], return_tensors="pt", **_PADDING
            )
            batch["qformer_input_ids"] = prompts["input_ids"]
            batch["qformer_attention_mask"] = prompts["attention_mask"]
        if self._model.encoder_decoder:
            batch.update(self._decoder_inputs(texts))
        return batch

    def process(self, texts: Sequence[Text]) -> InputBatch:
        """Call the processor; an error names the sample that it is about."""
        images = [[_open_image(path, text.sample) for path in text.sample.images] for text in texts]
        try:
            return self._call([text.text for text in texts], images, texts[0].special_tokens)
        except REFUSALS as error:
            if len(texts) == 1:
                raise InputError(
                    f"{texts[0].sample.where}: the processor refuses it: {first_line(error)}"
                ) from error
            for text in texts:
                self.process([text])
            raise InputError(
                f"{texts[0].sample.where} to {texts[-1].sample.line}: the processor takes each of"
                f" them, but not in one batch: {first_line(error)}; use --batch-size 1"
            ) from error

    def _call(
        self, texts: list[str], images: Sequence[list[Any]], special_tokens: bool
    ) -> InputBatch:
        options = {**_PADDING, "add_special_tokens": special_tokens}
        if self._processor is not self._tokenizer:
            pictures = images if any(images) else None
            batch = self._processor(
                text=texts, images=pictures, text_kwargs=options, return_tensors="pt"
            )
        elif any(images):
            raise ValueError("the checkpoint has a tokenizer only, which takes no images")
        else:
            batch = self._tokenizer(texts, return_tensors="pt", **options)
        odd = [key for key, value in batch.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise ValueError(f"{', '.join(odd)} of the samples differ in size")
        return dict(batch)

    def _check_lengths(self, texts: Sequence[Text], mask: torch.Tensor) -> None:
        positions = self._model.positions
        for text, length in zip(texts, mask.sum(1).tolist(), strict=True):
            if positions is not None and length > positions:
                raise InputError(
                    f"{text.sample.where}: has {length} tokens, the model has {positions}"
                    " positions; shorten it or leave it out"
                )
            if length > self._max_length:
                raise InputError(
                    f"{text.sample.where}: has {length} tokens, the limit is {self._max_length};"
                    " shorten it, leave it out or raise --max-length"
                )

    def _decoder_inputs(self, texts: Sequence[Text]) -> InputBatch:
        """The answers moved one to the right behind the start token, as the model is trained."""
        start = self._model.decoder_start
        if start is None:
            raise InputError(
                "the model's configuration has no decoder_start_token_id; expected one for an"
                " encoder-decoder; add it to config.json"
            )
        answers = self._tokenizer([text.answer for text in texts], return_tensors="pt", **_PADDING)
        ids = answers["input_ids"]
        first = torch.full_like(ids[:, :1], start)
        return {
            "decoder_input_ids": torch.cat([first, ids[:, :-1]], dim=1),
            "decoder_attention_mask": answers["attention_mask"],
        }


def _answer_mask(
    text: Text, ids: torch.Tensor, renderer: Renderer, encoder: _Encoder
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


def _open_image(path: Path, sample: Sample) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{sample.where}: image {path} cannot be read: {first_line(error)}"
        ) from error


def _cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
