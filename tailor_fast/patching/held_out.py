"""How well a model answers samples that nothing was fitted on.

The score of a sample is the mean probability of the right answer's tokens, each after the right
ones before it: the share of them that the model would get right if it drew them. It needs no metric
of the task, falls smoothly with damage, and counts a lost token once, where a likelihood would let
a single one decide. The last token, which ends the answer, does not count: any model is nearly sure
of it, so that it would hide half of what is lost of answers of one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from greenlet import getcurrent
from torch import nn

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.lockstep import Site, Stream
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.streamed import StreamedModel, attach, run_dtype
from tailor_fast.models import Residency, caller, find_targets
from tailor_fast.models.tokens import TOKEN_MASK
from tailor_fast.patching.head_passes import (
    ROWS,
    UnaskableError,
    asked_at_head,
    block_sites,
    head_of,
    run_by_blocks,
)


class HeldOut:
    """The samples of one data file that are held back, ready to be asked.

    Args:
        path: the data file.
        processor: directory of the processor.
        model: runs them; others of its kind may be asked as well.
        options: of the run that the samples are held back from.
        spill: directory for what exceeds ``options.max_ram``.

    Attributes:
        samples: how many.

    Raises:
        InputError: there are too few samples, one has no answer, or the model has no head.
        UsageError: ``options.max_ram`` is less than the largest block and the head take.
    """

    def __init__(
        self, path: Path, processor: Path, model: StreamedModel, options: RunOptions, spill: Path
    ) -> None:
        self._path, self._spill = path, spill
        try:
            head = head_of(model.model)
        except UnaskableError as error:
            raise InputError(
                f"{error}; expected a model that answers in tokens where a target is searched for"
            ) from error
        self._two = bool(model.model.config.get_text_config().is_encoder_decoder)
        asked = replace(options, part="held", tokens="all" if self._two else "answer")
        data = read_data(path, processor, model.model, asked, torch.device(options.device))
        self._batches, self.samples = data.batches, data.samples
        self._budget = None
        if options.max_ram is not None:
            self._budget = options.max_ram - _check(options.max_ram, model.model, head)
        self._sites: Sequence[Site] | None = None

    def ask(self, model: StreamedModel) -> Answers:
        """Run every sample through ``model``; each of its blocks is read once."""
        answers = _Asked(self._two, model.model, str(self._path))
        stream = Stream("held back", model.model, self._batches, answers.call)
        with ExitStack() as stack:
            attach(stack, model)
            if self._sites is None:
                self._sites = block_sites(model, self._batches)
            spill = None
            if self._budget is not None:
                spill = ActivationSpill(self._budget, self._spill)
                stack.callback(spill.close)
            stack.enter_context(asked_at_head(answers.head, answers.places, lambda hidden: hidden))
            try:
                run_by_blocks(model, spill, self._sites)(stream)
            except UnaskableError as error:
                raise InputError(
                    f"{self._path}: {error}; expected one answer a token; prepare the batches as"
                    " the model sees them"
                ) from error
        scores = [answers.scores[id(batch)] for batch in self._batches]
        return Answers(torch.from_numpy(np.concatenate(scores)))


class Answers:
    """What a model made of samples that were held back.

    Args:
        right: score of each sample, float64 ``[samples]``.
    """

    def __init__(self, right: torch.Tensor) -> None:
        self.right = right

    def over(self, other: Answers) -> tuple[float, float]:
        """This model's score over another's on the same samples, and its standard error.

        The error is that of a ratio of sums over paired samples (Cochran, Sampling Techniques,
        1977, section 6.4).

        Raises:
            InputError: the other model's score is zero.
        """
        ours, theirs, count = self.right, other.right, len(self.right)
        whole = float(theirs.sum())
        if not whole > 0.0:
            raise InputError(
                "the model that is to be kept gives the right answers of the samples that are held"
                " back no probability; expected a model that knows some; check the data"
            )
        ratio = float(ours.sum()) / whole
        spread = float((ours - ratio * theirs).square().sum())
        return ratio, math.sqrt(spread * count / (count - 1)) / whole


class _Asked:
    """Calls a model on lanes' batches, and keeps each sample's score."""

    def __init__(self, two: bool, model: nn.Module, where: str) -> None:
        self._two, self._where = two, where
        self.head, self._run = head_of(model), caller(model, with_head=True)
        self.places: dict[Any, torch.Tensor] = {}  # by the lane that runs
        self.scores: dict[int, npt.NDArray[np.float64]] = {}  # by the batch

    def call(self, module: nn.Module, batch: Any) -> None:
        """Run one batch to its end."""
        ids, mask = self._tokens(batch)
        # Each token is answered one place earlier.
        wanted = self.places[getcurrent()] = nn.functional.pad(mask[:, 1:], (0, 1))
        output: Any = self._run(module, batch)
        logits = output.logits.flatten(0, -2)
        words = ids[:, 1:][mask[:, 1:]]
        sums = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        samples = wanted.nonzero()[:, 0]
        for rows, right, owner in zip(
            logits.split(ROWS), words.split(ROWS), samples.split(ROWS), strict=True
        ):
            found = rows.float().log_softmax(-1).gather(1, right[:, None])[:, 0]
            sums.index_add_(0, owner, found.exp().double())
        if not bool(sums.isfinite().all()):
            raise InputError(
                f"{self._where}: the model's answers to samples that are held back are not finite;"
                " expected finite logits; check the checkpoint and its dtype"
            )
        counts = wanted.sum(1).clamp_min(1)
        # No tensor: those that outlive their lane may be spilled with it.
        self.scores[id(batch)] = (sums / counts).cpu().numpy().copy()

    def _tokens(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ``[batch, length]``, and bool of the same shape where a token counts."""
        if not self._two:
            return batch["input_ids"], _without_last(batch[TOKEN_MASK].bool())
        for key in ("decoder_input_ids", "decoder_attention_mask"):
            if key not in batch:
                raise InputError(
                    f"{self._where}: a batch that is held back has no {key}; expected it for an"
                    " encoder-decoder; add it"
                )
        # Moved one to the right, so that the token that ends an answer is not among them.
        return batch["decoder_input_ids"], batch["decoder_attention_mask"].bool()


def _without_last(mask: torch.Tensor) -> torch.Tensor:
    """``mask``, bool ``[batch, length]``, without the last of each row's places if it has more."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return mask & ~(last & (mask.sum(1, keepdim=True) > 1))


def _check(limit: int, model: Any, head: nn.Module) -> int:
    """Bytes of the largest block and of the head, which ``limit`` must hold."""
    names = [target.name for target in find_targets(model)]
    most = max(Residency.most_resident(model, names).values(), default=0)
    words = sum(parameter.numel() for parameter in head.parameters())
    taken = (most + words) * run_dtype(model).itemsize
    if taken > limit:
        raise UsageError(
            f"max_ram of {limit} bytes is too little: the largest block and the output head, by"
            f" which held-back samples are measured, take {taken}; expected more"
        )
    return taken
