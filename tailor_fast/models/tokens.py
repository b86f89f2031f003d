"""Which tokens of a layer's input count: padding never enters a statistic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.models.experts import routed_rows

# Says which tokens count where not all do that the model attends to; no input of any model.
TOKEN_MASK = "token_mask"
_QFORMER_MASK = "qformer_attention_mask"
# Entries of a batch that mask positions of a token sequence, [batch, length], 1 = counted.
MASK_INPUTS = (TOKEN_MASK, "attention_mask", "decoder_attention_mask", _QFORMER_MASK)
# What a module's name says and its place in the tree does not. In a decoder, layers that read the
# encoder's answer; in a Q-Former, layers that read queries or image tokens, which are never padded.
_READS_ENCODER = re.compile(r"(EncDecAttention|encoder_attn|crossattention|cross_attn)\.(k|v|key)")
_READS_NO_TEXT = re.compile(r"crossattention|_query\.")


class TokenMasks:
    """Finds the token mask for a layer's input from the batch and the layer's place in the model.

    Layers of the text model must see a sequence that one of the batch's masks fits. A Q-Former sees
    its queries, image tokens, and text behind the queries or alone; of these only text is padded.
    Other layers outside the text model (vision tower, projector) see image tokens: all count. An
    expert of a mixture sees the tokens routed to it.

    Args:
        model: the model whose layers are asked about. A model that names no text model
            (``get_decoder``) is taken as text throughout.
    """

    def __init__(self, model: nn.Module) -> None:
        decoder, encoder = _text_parts(model)
        names = {id(module): name for name, module in model.named_modules()}
        prefixes = (names.get(id(part), "") for part in (decoder, encoder))
        self._decoder, self._encoder = (f"{name}." if name else "" for name in prefixes)

    def is_text(self, name: str) -> bool:
        """Whether the layer called ``name`` reads the text sequence, or an encoder's answer."""
        return name.startswith(self._decoder) or self._in_encoder(name)

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
        if _QFORMER_MASK in masks and "qformer" in name.split("."):
            return _qformer_mask(name, x, masks[_QFORMER_MASK])
        if not masks or not self.is_text(name):
            return None
        if self._encoder:
            masks = self._of_two(name, masks)
            if not masks:
                return None
        rows = routed_rows(x)
        leading = tuple(x.shape[:-1])
        for mask in masks.values():
            flat = mask.reshape(-1).to(device=x.device, dtype=torch.bool)
            if rows is not None:
                return flat[rows]
            if leading == tuple(mask.shape) or leading == (mask.numel(),):
                return flat
        known = ", ".join(f"{key} {list(mask.shape)}" for key, mask in masks.items())
        raise InputError(
            f"{name}: its input {list(x.shape)} matches no mask of the batch ({known}); expected"
            " one mask entry per token; exclude the layer with `ignore`, or pad the batch as the"
            " model sees it"
        )

    def _in_encoder(self, name: str) -> bool:
        return bool(self._encoder) and name.startswith(self._encoder)

    def _of_two(self, name: str, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mask of the encoder's sequence or of the decoder's, which may be equally long."""
        encodes = self._in_encoder(name) or _READS_ENCODER.search(name)
        wanted = "attention_mask" if encodes else "decoder_attention_mask"
        return {wanted: masks[wanted]} if wanted in masks else {}

    @staticmethod
    def _masks(batch: Any) -> dict[str, torch.Tensor]:
        if not isinstance(batch, Mapping):
            return {}
        masks = {key: batch.get(key) for key in MASK_INPUTS}
        return {k: m for k, m in masks.items() if isinstance(m, torch.Tensor) and m.dim() == 2}


def _text_parts(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The decoder, or whatever reads the text, and the encoder of an encoder-decoder."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config() if callable(get_text_config) else None
    if decoder is None or not getattr(text, "is_encoder_decoder", False):
        return decoder, None
    encoder = model.get_encoder()  # type: ignore[operator]  # as transformers' models have it
    # Some models name a whole encoder-decoder here.
    holds_both = any(module is encoder for module in decoder.modules())
    return decoder.get_decoder() if holds_both else decoder, encoder


def _qformer_mask(name: str, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """The text's mask behind queries, all of which count, or alone."""
    queries = x.shape[-2] - mask.shape[1]
    if queries < 0 or x.shape[:-2] != mask.shape[:1] or _READS_NO_TEXT.search(name):
        return None
    whole = torch.cat([mask.new_ones(len(mask), queries), mask], dim=1)
    return whole.reshape(-1).to(device=x.device, dtype=torch.bool)
