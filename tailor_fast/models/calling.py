"""One forward call of a model on one batch, as calibration makes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tailor_fast.models.tokens import TOKEN_MASK

# Labels are never needed for activations, and the loss costs a pass over the vocabulary.
_DROPPED = ("labels", "decoder_labels", TOKEN_MASK)


def caller(model: nn.Module) -> Callable[[nn.Module, Any], object]:
    """Return how to call ``model`` on a batch: keywords, positions, or one tensor.

    A transformers model is called without a cache of keys and values: nothing is generated.
    """
    accepts = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts else {}

    def call(module: nn.Module, batch: Any) -> object:
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key not in _DROPPED}
            return module(**{**extra, **inputs})
        if isinstance(batch, Sequence):
            return module(*batch, **extra)
        return module(batch, **extra)

    return call
