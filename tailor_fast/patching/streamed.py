"""Layers from disk to disk: read from both checkpoints, written as soon as they are patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tailor_fast._core.progress import Progress
from tailor_fast._core.transfer import Outbox, to_device
from tailor_fast.calibration.streamed import StreamedModel
from tailor_fast.checkpoint import Hashed
from tailor_fast.checkpoint.files import byte_view
from tailor_fast.models import Target
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.resuming import Ledger
from tailor_fast.patching.shared import Discard, SharedLedger
from tailor_fast.patching.sources import LayerOnDisk, Sources


@dataclass
class StreamedWeights:
    """``Weights`` from disk to disk.

    Attributes:
        sources: the open pair.
        writer: the output; each patched weight is written as soon as it is known.
        layers: layers by module name.
        device: where layers are solved.
        ledger: what an earlier run finished, and this one.
        patched: the model that runs with patched weights; None without propagation.
        written: names of the tensors written.
    """

    sources: Sources
    writer: Writer | Discard
    layers: dict[str, LayerOnDisk]
    device: torch.device
    ledger: Ledger | SharedLedger
    patched: StreamedModel | None = None
    written: set[str] = field(default_factory=set)
    _outbox: Outbox = field(default_factory=Outbox)

    def pair(self, target: Target) -> LayerPair:
        """Read the layer's tensors from both checkpoints."""
        return read_pair(self.sources, self.layers[target.name], self.device)

    def read_unpatched(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` of the output as it is without a patch."""
        sources, joined = self.sources, self.sources.joined
        sides = {"base": sources.base, "tuned": sources.tuned}
        info, parts = joined.tensors[name], joined.origins[name]
        if len(parts) == 1:
            stored = sides[parts[0].side].checkpoint.tensors[name]
            if (stored.shape, stored.dtype) == (info.shape, info.dtype):
                return sides[parts[0].side].read(name)
        tensor = torch.empty(info.shape, dtype=info.torch_dtype)
        words = byte_view(tensor, writable=True)
        for part in parts:
            source = sides[part.side]
            source.read_into(name, words[part.begin : part.end], part.begin, part.end)
        return tensor

    def install(self, target: Target, weight: torch.Tensor, row: LinearReport) -> None:
        """Write ``weight`` ``[rows, cols]`` to the output; the patched model runs with it."""
        layer = self.layers[target.name]
        row.tensor = layer.tensor
        self.ledger.rows[layer.tensor] = row
        stored = weight.T.contiguous() if target.transposed else weight
        self.writer.put(layer.tensor, *self._outbox.send(stored))
        self.written.add(layer.tensor)
        self._set(target, stored)

    def patched_earlier(self, target: Target) -> LinearReport | None:
        """The line of a layer that an earlier run patched; None of any other."""
        return self.ledger.patched_earlier(self.layers[target.name].tensor)

    def install_again(self, target: Target) -> None:
        """Let the patched model run with the words that the earlier run wrote."""
        tensor = self.layers[target.name].tensor
        self.written.add(tensor)
        self._set(target, self.ledger.read(tensor))

    def preview(self, target: Target) -> None:
        """Let the patched model run with the tuned weight."""
        self._set(target, self.sources.tuned.read(self.layers[target.name].tensor))

    def told(self, progress: Progress) -> Callable[[str, int, int], None]:
        """What tells ``progress`` of a group that is solved: its name, how many are, and of all."""
        sizes = self.sources.tuned.checkpoint.tensors

        def told(name: str, done: int, total: int) -> None:
            written = sum(sizes[tensor].nbytes for tensor in self.written)
            try:
                progress.group(name, done, total, written)
            except KeyboardInterrupt:
                self.writer.drain()  # the group is finished only when it is written
                raise

        return told

    def _set(self, target: Target, stored: torch.Tensor) -> None:
        if self.patched is not None:
            name = f"{target.name}.weight"
            self.patched.residency.set(name, self.patched.to_run(stored))


def read_pair(sources: Sources, layer: LayerOnDisk, device: torch.device) -> LayerPair:
    """Read a layer's tensors from both checkpoints; weights become ``[rows, cols]``."""

    def matrix(source: Hashed) -> torch.Tensor:
        stored = to_device(source.read(layer.tensor), device)
        if layer.target.transposed:
            stored = stored.transpose(-2, -1).contiguous()
        return stored.view(-1, stored.shape[-1])

    def bias(source: Hashed) -> torch.Tensor | None:
        return None if layer.bias is None else to_device(source.read(layer.bias), device)

    base, tuned = sources.base, sources.tuned
    return LayerPair(matrix(base), matrix(tuned), bias(base), bias(tuned))
