"""Layers from disk to disk: read from both checkpoints, written as soon as they are patched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tailor_fast.calibration.streamed import StreamedModel
from tailor_fast.checkpoint import Hashed
from tailor_fast.models import Target
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.sources import LayerOnDisk, Sources


@dataclass
class StreamedWeights:
    """``Weights`` from disk to disk.

    Attributes:
        sources: the open pair.
        writer: the output; each patched weight is written as soon as it is known.
        layers: layers by module name.
        device: where layers are solved.
        patched: the model that runs with patched weights; None without propagation.
        written: names of the tensors written.
    """

    sources: Sources
    writer: Writer
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
        self.writer.put(layer.tensor, stored.cpu())
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
