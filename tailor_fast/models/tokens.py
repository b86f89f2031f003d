"""Which tokens of a layer's input count: padding never enters a statistic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tailor_fast._core.errors import InputError

# Says which tokens count where not all do that the model attends to; no input of any model.
TOKEN_MASK = "token_mask"
# Entries of a batch that mask positions of a token sequence, [batch, length], 1 = counted.
MASK_INPUTS = (TOKEN_MASK, "attention_mask", "decoder_attention_mask", "qformer_attention_mask")


class TokenMasks:
    """Finds the token mask for a layer's input from the batch and the layer's place in the model.

    Text layers must see a sequence whose length one of the batch's masks has. Layers outside the
    text model (vision tower, projector) see image tokens, which are never padded: all count.

    Args:
        model: the model whose layers are asked about. A model that names no text model
            (``get_decoder``) is taken as text throughout.
    """

    def __init__(self, model: nn.Module) -> None:
        get_decoder = getattr(model, "get_decoder", None)
        decoder = get_decoder() if callable(get_decoder) else None
        names = {id(module): name for name, module in model.named_modules()}
        prefix = names.get(id(decoder), "") if decoder is not None else ""
        self._text_prefix = f"{prefix}." if prefix else ""

    def is_text(self, name: str) -> bool:
        """Whether the layer called ``name`` reads the text sequence."""
        return name.startswith(self._text_prefix)

    def find(self, name: str, x: torch.Tensor, batch: Any) -> torch.Tensor | None:
        """Return the bool mask ``[tokens]`` for ``x`` flattened to tokens; None when all count.

        Args:
            name: the layer's module name.
            x: the layer's input ``[..., cols]``.
            batch: the batch as it was given to the model.

        Raises:
            InputError: a text layer's input has a length that no mask of the batch has.
        """
        masks = self._masks(batch)
        if not masks or not self.is_text(name):
            return None
        leading = tuple(x.shape[:-1])
        for mask in masks.values():
            if leading == tuple(mask.shape) or leading == (mask.numel(),):
                return mask.reshape(-1).to(device=x.device, dtype=torch.bool)
        known = ", ".join(f"{key} {list(mask.shape)}" for key, mask in masks.items())
        raise InputError(
            f"{name}: its input {list(x.shape)} matches no mask of the batch ({known}); expected"
            " one mask entry per token; exclude the layer with `ignore`, or pad the batch as the"
            " model sees it"
        )

    @staticmethod
    def _masks(batch: Any) -> dict[str, torch.Tensor]:
        if not isinstance(batch, Mapping):
            return {}
        masks = {key: batch.get(key) for key in MASK_INPUTS}
        return {k: m for k, m in masks.items() if isinstance(m, torch.Tensor) and m.dim() == 2}
