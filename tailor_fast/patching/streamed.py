"""Layers streamed from disk: one block of each model in memory, patched weights written at once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tailor_fast.checkpoint import StagedCheckpoint
from tailor_fast.models import Residency, Target
from tailor_fast.patching.solving import LayerPair
from tailor_fast.patching.sources import Hashed, LayerOnDisk, Sources, run_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamedModel:
    """A model whose blocks are read when a forward pass enters them.

    Args:
        sources: the open pair.
        source: the one of the two whose weights this model runs with.
        device: where it runs.
    """

    def __init__(self, sources: Sources, source: Hashed, device: torch.device) -> None:
        self.model: PreTrainedModel = sources.skeleton(source)
        self._dtype = run_dtype(self.model)
        self._sources = sources
        self._source = source
        self._device = device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self.residency = Residency(self.model, self._load)

    def _load(self, name: str) -> torch.Tensor | None:
        key = self._sources.keys.get(name)
        return None if key is None else self.to_run(self._source.read(key))

    def to_run(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the model's device, floating words in the model's dtype."""
        if tensor.is_floating_point():
            return tensor.to(self._device, self._dtype)
        return tensor.to(self._device)


@dataclass
class StreamedWeights:
    """``Weights`` from disk to disk.

    Attributes:
        sources: the open pair.
        staged: the output; each patched weight is written as soon as it is known.
        layers: layers by module name.
        device: where layers are solved.
        patched: the model that runs with patched weights; None without propagation.
        written: names of the tensors written.
    """

    sources: Sources
    staged: StagedCheckpoint
    layers: dict[str, LayerOnDisk]
    device: torch.device
    patched: StreamedModel | None = None
    written: set[str] = field(default_factory=set)

    def pair(self, target: Target) -> LayerPair:
        """Read the layer's tensors from both checkpoints."""
        layer = self.layers[target.name]
        return LayerPair(
            self._matrix(self.sources.base, layer),
            self._matrix(self.sources.tuned, layer),
            self._bias(self.sources.base, layer),
            self._bias(self.sources.tuned, layer),
        )

    def install(self, target: Target, weight: torch.Tensor) -> None:
        """Write ``weight`` ``[rows, cols]`` to the output; the patched model runs with it."""
        layer = self.layers[target.name]
        stored = weight.T.contiguous() if target.transposed else weight
        self.staged.write(layer.tensor, 0, stored.cpu())
        self.written.add(layer.tensor)
        self._set(target, stored)

    def preview(self, target: Target) -> None:
        """Let the patched model run with the tuned weight."""
        self._set(target, self.sources.tuned.read(self.layers[target.name].tensor))

    def _set(self, target: Target, stored: torch.Tensor) -> None:
        if self.patched is not None:
            name = f"{target.name}.weight"
            self.patched.residency.set(name, self.patched.to_run(stored))

    def _matrix(self, source: Hashed, layer: LayerOnDisk) -> torch.Tensor:
        stored = source.read(layer.tensor).to(self.device)
        return stored.T.contiguous() if layer.target.transposed else stored

    def _bias(self, source: Hashed, layer: LayerOnDisk) -> torch.Tensor | None:
        return None if layer.bias is None else source.read(layer.bias).to(self.device)


def attach(stack: ExitStack, *models: StreamedModel | None) -> None:
    """Load blocks on entry for as long as ``stack`` lasts."""
    for model in models:
        if model is not None:
            stack.enter_context(model.residency.attached())
