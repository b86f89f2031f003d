"""A model that runs from disk: the weights of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.transfer import to_device
from tailor_fast.checkpoint import Hashed
from tailor_fast.models import Residency, build_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton_of(source: Hashed) -> PreTrainedModel:
    """The model of a checkpoint, without its weights.

    Raises:
        InputError: no configuration, or no such class.
    """
    checkpoint = source.checkpoint
    if checkpoint.directory is None:
        raise InputError(
            f"{checkpoint.path}: a single file has no config.json beside it; expected a model"
            " directory; patch without calibration data"
        )
    return build_skeleton(checkpoint.directory)


def run_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model's forward pass runs in."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


class StreamedModel:
    """A model whose blocks are read when a forward pass enters them.

    Args:
        source: the checkpoint whose weights the model runs with.
        keys: state-dict name -> tensor name on disk.
        device: where it runs.
        read: gives a tensor by its name on disk; None reads it from ``source``.

    Attributes:
        source: the same.
    """

    def __init__(
        self,
        source: Hashed,
        keys: Mapping[str, str],
        device: torch.device,
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.model: PreTrainedModel = skeleton_of(source)
        self._dtype = run_dtype(self.model)
        self.source = source
        known = source.checkpoint.tensors
        self._keys = {name: key for name, key in keys.items() if key in known}
        self._read = source.read if read is None else read
        self._device = device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self.residency = Residency(self.model, self._load)

    def to_run(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the model's device, floating words in the model's dtype."""
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return to_device(tensor, self._device, dtype)

    def _load(self, name: str) -> torch.Tensor | None:
        key = self._keys.get(name)
        return None if key is None else self.to_run(self._read(key))


def attach(stack: ExitStack, *models: StreamedModel | None) -> None:
    """Load blocks on entry for as long as ``stack`` lasts."""
    for model in models:
        if model is not None:
            stack.enter_context(model.residency.attached())
