"""One forward call of a model on one batch, as calibration makes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from tailor_fast.models.residency import output_head
from tailor_fast.models.tokens import TOKEN_MASK

# Labels are never needed for activations, and the loss costs a pass over the vocabulary.
_DROPPED = ("labels", "decoder_labels", TOKEN_MASK)


class _HeadReachedError(Exception):
    """Ends a forward pass where the output head begins."""


def caller(model: nn.Module, *, with_head: bool = False) -> Callable[[nn.Module, Any], object]:
    """Return how to call ``model``, and others of its kind, on a batch.

    A batch is a mapping of keywords, a sequence of positions, or one tensor. A transformers model
    is called without a cache of keys and values, and only up to its output head, unless
    ``with_head``: nothing is generated, and the logits of a whole batch are larger than everything
    else.
    """
    accepts = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts or _hands_on(model, accepts) else {}

    def call(module: nn.Module, batch: Any) -> object:
        try:
            with nullcontext() if with_head else _stopped_at_head(module):
                if isinstance(batch, Mapping):
                    inputs = {key: value for key, value in batch.items() if key not in _DROPPED}
                    return module(**{**extra, **inputs})
                if isinstance(batch, Sequence):
                    return module(*batch, **extra)
                return module(batch, **extra)
        except _HeadReachedError:
            return None

    return call


def _hands_on(model: nn.Module, accepts: Mapping[str, inspect.Parameter]) -> bool:
    """Whether the model hands keywords on to a language model that would keep a cache."""
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    get_text = getattr(getattr(model, "config", None), "get_text_config", None)
    return open_ended and callable(get_text) and getattr(get_text(), "use_cache", None) is not None


@contextmanager
def _stopped_at_head(module: nn.Module) -> Iterator[None]:
    head = output_head(module)
    if head is None:
        yield
        return

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _HeadReachedError

    # Before every other hook: the head's weights are not to be loaded either.
    handle = head.register_forward_pre_hook(stop, prepend=True)
    try:
        yield
    finally:
        handle.remove()
