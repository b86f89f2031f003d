"""Texts and images through a processor, as tensors that a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import InputError
from tailor_fast.models.samples import Sample
from tailor_fast.models.texts import REFUSALS, Text, first_line, tokenizer_of

InputBatch = dict[str, torch.Tensor]


class NamedBatch(InputBatch):
    """A batch that knows its samples.

    Attributes:
        samples: where each row comes from, as messages name it.
    """

    samples: tuple[str, ...] = ()

    def to(self, device: torch.device) -> NamedBatch:
        """The same on a device."""
        moved = NamedBatch({key: value.to(device) for key, value in self.items()})
        moved.samples = self.samples
        return moved


FROM_THE_RIGHT = {"padding": True, "padding_side": "right", "return_attention_mask": True}
FROM_THE_LEFT = {**FROM_THE_RIGHT, "padding_side": "left"}


@dataclass(frozen=True)
class ModelInfo:
    """What of the configuration matters here."""

    positions: int | None = None
    encoder_decoder: bool = False
    decoder_start: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelInfo:
        if config is None:
            return cls()
        text = config.get_text_config()
        return cls(
            getattr(text, "max_position_embeddings", None),
            bool(text.is_encoder_decoder),
            getattr(text, "decoder_start_token_id", None),
        )


class Encoder:
    """Texts and images to tensors, by one processor for one model."""

    def __init__(
        self,
        processor: Any,
        model: ModelInfo,
        max_length: int,
        padding: Mapping[str, Any] = FROM_THE_RIGHT,
    ) -> None:
        self._padding = padding
        self._processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._qformer = getattr(processor, "qformer_tokenizer", None)
        self._model = model
        self._max_length = max_length

    def encode(self, texts: Sequence[Text]) -> InputBatch:
        """Turn texts of one kind into one batch."""
        batch = self.read(texts)
        if self._model.encoder_decoder:
            batch.update(self._decoder_inputs(texts))
        return batch

    def read(self, texts: Sequence[Text]) -> InputBatch:
        """The same without what a decoder of its own reads."""
        batch = self.process(texts)
        self._check_lengths(texts, batch["attention_mask"])
        if self._qformer is not None:
            prompts = self._qformer(
                [text.prompt for text in texts], return_tensors="pt", **FROM_THE_RIGHT
            )
            batch["qformer_input_ids"] = prompts["input_ids"]
            batch["qformer_attention_mask"] = prompts["attention_mask"]
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
        options = {**self._padding, "add_special_tokens": special_tokens}
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
        answers = self._tokenizer(
            [text.answer for text in texts], return_tensors="pt", **FROM_THE_RIGHT
        )
        ids = answers["input_ids"]
        first = torch.full_like(ids[:, :1], start)
        return {
            "decoder_input_ids": torch.cat([first, ids[:, :-1]], dim=1),
            "decoder_attention_mask": answers["attention_mask"],
        }


def _open_image(path: Path, sample: Sample) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{sample.where}: image {path} cannot be read: {first_line(error)}"
        ) from error


def cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
