"""What fine-tuning changed of the base model's answers on old tasks, and the weight it calls for.

One retention weight is not right for all fine-tunes: where little is forgotten it costs the new
task, where much is, it does not hold. What a model forgot shows in what it would say: of the tokens
of the answers, each after the true ones before it, the share whose most likely token is another one
in the two models. The end of an answer does not count, which hardly any fine-tuning moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from greenlet import getcurrent
from torch import nn

from tailor_fast._core.processes import Processes
from tailor_fast.calibration.lockstep import Batch, Stream
from tailor_fast.models import caller
from tailor_fast.models.tokens import TOKEN_MASK
from tailor_fast.patching.head_passes import ROWS, Run, UnaskableError, asked_at_head, head_of
from tailor_fast.patching.recipe import DEFAULT_RETAIN, MEASURED_RETAIN, Recipe
from tailor_fast.patching.report import Report

_NO_LABEL = -100
Words = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Forgotten:
    """How many of the asked tokens the fine-tuned model would say otherwise."""

    changed: int
    asked: int

    @property
    def share(self) -> float:
        """Of all, 0 to 1."""
        return self.changed / self.asked


def settle_retain_weight(
    recipe: Recipe,
    models: Sequence[tuple[nn.Module, Run]],
    batches: Sequence[Batch],
    report: Report,
    processes: Processes,
) -> Recipe:
    """Give an open ``retain_weight`` its value, and say in the report how it was found.

    Args:
        recipe: as resolved.
        models: base and tuned, each with how it is run on a stream of batches.
        batches: samples of old tasks; in several processes, this one's share.
        report: told.
        processes: all of them settle on the same value.
    """
    try:
        words = [_words(model, batches, run) for model, run in models]
        pairs = list(zip(*words, strict=True))
        found = Forgotten(sum(int((a != b).sum()) for a, b in pairs), sum(len(a) for a, _ in pairs))
        why = ""
    except UnaskableError as unknown:
        found, why = Forgotten(0, 0), str(unknown)
    counts = processes.gather_json([found.changed, found.asked, why])
    found = Forgotten(sum(count[0] for count in counts), sum(count[1] for count in counts))
    why = next((count[2] for count in counts if count[2]), "")
    if why or not found.asked:
        report.notes.append(
            f"retain_weight {DEFAULT_RETAIN:g}: not measured, {why or 'no answer token is known'}"
        )
        return recipe.model_copy(update={"retain_weight": DEFAULT_RETAIN})
    weight = MEASURED_RETAIN * found.share
    report.notes.append(
        f"retain_weight {weight:.3g}: on old tasks, the tuned model would say"
        f" {100 * found.share:.1f}% of {found.asked} answer tokens otherwise than the base model"
    )
    return recipe.model_copy(update={"retain_weight": weight})


def _words(model: nn.Module, batches: Sequence[Batch], run: Run) -> list[Words]:
    """The most likely tokens of each batch's asked places, ``[places]``."""
    asked = _Asked(model)
    with asked_at_head(asked.head, asked.places, asked.show):
        run(Stream("asked", model, batches, asked.call))
    return [asked.words[id(batch)] for batch in batches]


class _Asked:
    """Calls a model on batches, and keeps what it would say at their asked places."""

    def __init__(self, model: nn.Module) -> None:
        self.head, self._run = head_of(model), caller(model, with_head=True)
        get_text: Any = getattr(getattr(model, "config", None), "get_text_config", None)
        text = get_text() if callable(get_text) else None
        self._two = bool(getattr(text, "is_encoder_decoder", False))
        ends = getattr(text, "eos_token_id", None)
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())
        self.places: dict[Any, torch.Tensor] = {}  # by the lane that runs
        self._found: dict[Any, Words] = {}
        self.words: dict[int, Words] = {}  # by the batch

    def call(self, module: nn.Module, batch: Batch) -> None:
        """Run one batch to its end."""
        lane = getcurrent()
        self.places[lane] = self._asked_places(batch)
        self._run(module, batch)
        self.places.pop(lane, None)
        if lane not in self._found:
            raise UnaskableError(f"{type(module).__name__} does not call its output head")
        self.words[id(batch)] = self._found.pop(lane)

    def _asked_places(self, batch: Batch) -> torch.Tensor:
        """Bool ``[batch, length]``, where the next token belongs to an answer."""
        prefix = "decoder_" if self._two else ""
        if not isinstance(batch, Mapping) or f"{prefix}input_ids" not in batch:
            raise UnaskableError(f"a batch has no {prefix}input_ids")
        ids = batch[f"{prefix}input_ids"]
        labels, mask = batch.get("labels"), batch.get(TOKEN_MASK)
        if labels is not None and labels.shape == ids.shape and not self._two:
            counted = labels != _NO_LABEL
        elif mask is None or self._two:
            mask = batch.get(f"{prefix}attention_mask")
            counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        else:
            counted = mask.bool()
        for end in self._ends:
            counted = counted & (ids != end)
        return nn.functional.pad(counted[:, 1:], (0, 1))

    def show(self, hidden: torch.Tensor) -> torch.Tensor:
        """Ask the head, few places at a time; it need not see them again."""
        found = [self.head.forward(rows).argmax(-1) for rows in hidden.split(ROWS)]
        # No tensor: those that outlive their lane may be spilled with it.
        self._found[getcurrent()] = torch.cat(found).cpu().numpy().copy()
        return hidden[:0]
