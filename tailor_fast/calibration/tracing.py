"""What one forward pass holds on its way, known without weights: a pass on ``meta`` tensors."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tailor_fast._core.meter import Meter
from tailor_fast.calibration.lockstep import evaluating
from tailor_fast.models import caller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = ("input_ids", "decoder_input_ids")
_MASK = "attention_mask"


@dataclass(frozen=True)
class Lane:
    """Activations of one forward pass at one layer, in bytes.

    Attributes:
        tokens: that the layer sees, padding included.
        stand: alive while the pass stands before the layer, the layer's input included.
        run: most alive on the way there from the layer before.
    """

    tokens: int
    stand: int
    run: int

    def most(self, other: Lane) -> Lane:
        """The larger of both in each respect."""
        return Lane(
            max(self.tokens, other.tokens), max(self.stand, other.stand), max(self.run, other.run)
        )


def trace_lanes(
    skeleton: PreTrainedModel, batches: Iterable[Mapping[str, Any]], names: Iterable[str]
) -> tuple[dict[str, Lane], str]:
    """Run one batch of each size without data.

    The passes are over the text alone, in which a picture's tokens have their places: what becomes
    of a picture may hang on the data.

    Args:
        skeleton: the model without its weights.
        batches: the data.
        names: of the layers.

    Returns:
        The most that a pass holds at each layer, and why it is not known, else empty.
    """
    model = copy.deepcopy(skeleton)
    nn.Module.to(model, "meta")  # the model's own `to` has a type that says nothing of devices
    found: dict[str, Lane] = {}
    wanted = list(names)
    shapes: dict[tuple[Any, ...], tuple[Mapping[str, Any], bool]] = {}
    for batch in batches:
        sizes = {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        padded = _MASK in sizes and not bool(batch[_MASK].all())
        shapes[(*sorted(sizes.items()), padded)] = batch, padded
    for batch, padded in shapes.values():
        moved = {k: v.to("meta") for k, v in batch.items() if isinstance(v, torch.Tensor)}
        taken = (*_TEXT, _MASK) if padded else _TEXT
        text = {name: moved[name] for name in taken if name in moved}
        try:
            lanes = _trace(model, text, wanted, padded)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return {}, str(error).splitlines()[0]
        for name, lane in lanes.items():
            found[name] = lane.most(found.get(name, lane))
    return found, ""


class _AsOnDevice(TorchFunctionMode):
    """Takes the way of a pass with padding or without, with attention as devices' kernels do it.

    Meta tensors would form attention's matrix, and have no values for a model to look at: it asks
    whether all tokens count.
    """

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self._padded = padded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _key, value = args[:3]
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            if mask is not None and mask.dtype is torch.bool:
                mask = mask.to(query.dtype)  # the kernels add it
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        if func is torch.Tensor.__bool__:
            return not self._padded
        if func is torch.Tensor.item:
            return 1
        return func(*args, **(kwargs or {}))


def _trace(
    model: nn.Module, batch: Mapping[str, Any], names: Iterable[str], padded: bool
) -> dict[str, Lane]:
    meter, lanes = Meter("meta"), dict[str, Lane]()
    last: list[tuple[weakref.ref[torch.Tensor], Lane]] = []

    def stop(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if last and last[0][0]() is x:  # another layer of the group, at which no pass stops
                lane = last[0][1]
            else:
                run = meter.reset()
                lane = Lane(x.numel() // max(1, x.shape[-1]), meter.live, run)
                last[:] = [(weakref.ref(x), lane)]
            lanes[name] = lane.most(lanes.get(name, lane))

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(stop(name)) for name in names]
    try:
        with torch.no_grad(), evaluating(model), _AsOnDevice(padded), meter:
            caller(model)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return lanes
