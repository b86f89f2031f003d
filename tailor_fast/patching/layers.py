"""A layer in both models, and where layers come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tailor_fast.models import Target
from tailor_fast.patching.report import LinearReport


@dataclass(frozen=True)
class LayerPair:
    """A layer's tensors in both models, in the models' dtype; weights ``[rows, cols]``."""

    base: torch.Tensor
    tuned: torch.Tensor
    base_bias: torch.Tensor | None
    tuned_bias: torch.Tensor | None

    def rows(self, part: slice) -> LayerPair:
        """Some rows of the layer, not copied."""
        biases = (None if b is None else b[part] for b in (self.base_bias, self.tuned_bias))
        return LayerPair(self.base[part], self.tuned[part], *biases)


class Weights(Protocol):
    """Where the engine takes layers from and puts patched weights."""

    def pair(self, target: Target) -> LayerPair:
        """Return the layer's tensors in the base and the tuned model."""

    def install(self, target: Target, weight: torch.Tensor, row: LinearReport) -> None:
        """Take the patched weight ``[rows, cols]``: the patched model runs with it from now on.

        ``row`` is its line of the report.
        """

    def patched_earlier(self, target: Target) -> LinearReport | None:
        """The line of a layer that an earlier run patched; None of any other."""

    def install_again(self, target: Target) -> None:
        """Let the patched model run with what the earlier run made of the layer."""

    def preview(self, target: Target) -> None:
        """Let the patched model run with the tuned weight until ``install`` is called."""
