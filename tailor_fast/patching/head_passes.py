"""Models asked for what they would say: whole forward passes, the output head at a few places.

The logits of a whole batch are larger than everything else; answers are a few tokens of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn

from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Batch, Lockstep, Site, Stream, run_all
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.streamed import StreamedModel
from tailor_fast.models import caller
from tailor_fast.models.residency import output_head

ROWS = 256  # of which logits are computed with at a time
Run = Callable[[Stream], None]


class UnaskableError(Exception):
    """What a model would say cannot be asked; the message says why."""


def head_of(model: nn.Module) -> nn.Module:
    """The output head of a language model.

    Raises:
        UnaskableError: it has none.
    """
    head = output_head(model)
    if head is None:
        raise UnaskableError(f"{type(model).__name__} has no output head")
    return head


@contextmanager
def asked_at_head(
    head: nn.Module, places: dict[Any, torch.Tensor], show: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let the output head see the places alone that are asked for.

    Args:
        head: the model's.
        places: bool ``[batch, length]`` by the lane that runs the batch; taken out when the lane
            comes to the head.
        show: gets the hidden states of those places, ``[places, width]``, and gives those that the
            head goes on with.
    """

    def select(_head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        hidden, asked = args[0], places.pop(getcurrent(), None)
        if asked is None:
            return None
        if hidden.shape[:-1] != asked.shape:
            raise UnaskableError(
                f"the model answers at {list(hidden.shape[:-1])} places for {list(asked.shape)}"
                " tokens"
            )
        return (show(hidden[asked.to(hidden.device)])[None],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def run_in_memory(stream: Stream) -> None:
    """Run every batch, one after the other."""
    for _ in run_all(stream):
        pass


def block_sites(streamed: StreamedModel, batches: Sequence[Batch]) -> Sequence[Site]:
    """Where a model on disk is stopped, before each of its blocks; the same in all of its kind."""
    plain = Stream("blocks", streamed.model, batches, caller(streamed.model))
    sites = discover(plain, (), streamed.residency.blocks).sites
    streamed.residency.release()
    return sites


def run_by_blocks(
    streamed: StreamedModel, spill: ActivationSpill | None, sites: Sequence[Site] | None = None
) -> Run:
    """How a model on disk is run: all batches at the same block, which is read once.

    Args:
        streamed: the model.
        spill: takes activations beyond a budget.
        sites: what ``block_sites`` gave for the kind, if it was asked before.
    """

    def run(stream: Stream) -> None:
        if not stream.batches:
            return
        found = sites if sites is not None else block_sites(streamed, stream.batches)
        with Lockstep([stream], found, spill=spill) as lockstep:
            for site in (*found, Site(len(found))):  # the last is never reached
                lockstep.gather(site)
        streamed.residency.release()

    return run
