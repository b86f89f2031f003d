"""The kinds of model that the protocols train: how each is made, kept, tuned and called."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import tinyblip, tinyllava
from benchmarks.quality.tinyllava import IMAGE, Batch

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        new_model: makes an untrained model from a seed.
        save: writes a model to a folder.
        load: reads it back.
        tuned: the parameters that fine-tuning the last ``n`` layers trains.
        blocks: number of blocks of the part that is tuned.
        extra: keyword arguments of the model besides ids and pixels, from the prompt's ids.
    """

    new_model: Callable[[int], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    tuned: Callable[[Any, int], list[torch.nn.Parameter]]
    blocks: Callable[[Any], int]
    extra: Callable[[torch.Tensor], Inputs]

    def inputs(self, batch: Batch) -> Inputs:
        """Prompt and answer as the model takes them, the answer's last token left out."""
        ids = torch.cat([batch.input_ids, batch.answer_ids], dim=1)[:, :-1]
        return {
            "input_ids": ids,
            "pixel_values": batch.pixel_values,
            **self.extra(batch.input_ids),
        }

    def answer_logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits ``[n, answer tokens, words]``: each token after the true ones before it."""
        kept = batch.answer_ids.shape[1]
        called = model(**self.inputs(batch), use_cache=False, logits_to_keep=kept)
        logits: torch.Tensor = called.logits
        return logits

    @torch.inference_mode()
    def right(self, model: Any, batch: Batch) -> torch.Tensor:
        """Whether greedy generation answers exactly, bool ``[n]``, by one forward pass.

        Generation that is right so far has the true tokens as its prefix, so it ends right exactly
        where every token is the best one after the true ones.
        """
        logits = self.answer_logits(model, batch)
        logits[..., IMAGE] = float("-inf")  # generation suppresses it
        return (logits.argmax(-1) == batch.answer_ids).all(dim=1)


def _llava_tuned(model: Any, layers: int) -> list[torch.nn.Parameter]:
    """The last blocks of the language model, and the projector."""
    blocks = model.model.language_model.layers[-layers:]
    return [*blocks.parameters(), *model.model.multi_modal_projector.parameters()]


def _blip_tuned(model: Any, layers: int) -> list[torch.nn.Parameter]:
    """The last layers of the Q-Former, all of it when there are no more, and the projection."""
    blocks = model.qformer.encoder.layer
    part = model.qformer if layers >= len(blocks) else blocks[-layers:]
    return [*part.parameters(), *model.language_projection.parameters()]


def _llava_blocks(model: Any) -> int:
    return len(model.model.language_model.layers)


def _blip_blocks(model: Any) -> int:
    return len(model.qformer.encoder.layer)


def _no_extra(_ids: torch.Tensor) -> Inputs:
    return {}


def _question(ids: torch.Tensor) -> Inputs:
    return {"qformer_input_ids": tinyblip.question_ids(ids)}


_LLAVA = partial(
    Family,
    save=tinyllava.save,
    load=tinyllava.load,
    tuned=_llava_tuned,
    blocks=_llava_blocks,
    extra=_no_extra,
)
FAMILIES = {
    "llava": _LLAVA(new_model=tinyllava.new_model),
    "llava-wide": _LLAVA(new_model=partial(tinyllava.new_model, width=128, layers=6)),
    "instructblip": Family(
        new_model=tinyblip.new_model,
        save=tinyblip.save,
        load=tinyblip.load,
        tuned=_blip_tuned,
        blocks=_blip_blocks,
        extra=_question,
    ),
}
