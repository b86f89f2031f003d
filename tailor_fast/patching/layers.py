"""A layer in both models, and where layers come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tailor_fast.models import Target


@dataclass(frozen=True)
class LayerPair:
    """A layer's tensors in both models, in the models' dtype; weights ``[rows, cols]``."""

    base: torch.Tensor
    tuned: torch.Tensor
    base_bias: torch.Tensor | None
    tuned_bias: torch.Tensor | None


class Weights(Protocol):
    """Where the engine takes layers from and puts patched weights."""

    def pair(self, target: Target) -> LayerPair:
        """Return the layer's tensors in the base and the tuned model."""

    def install(self, target: Target, weight: torch.Tensor) -> None:
        """Take the patched weight ``[rows, cols]``: the patched model runs with it from now on."""

    def preview(self, target: Target) -> None:
        """Let the patched model run with the tuned weight until ``install`` is called."""
