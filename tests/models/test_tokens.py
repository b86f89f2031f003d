"""Which tokens count, for every kind of sequence that a layer may read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tailor_fast._core.errors import InputError
from tailor_fast.models import TokenMasks
from tests.models.processors import gpt2
from tests.models.zoo import FAMILIES

FIRST = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
SECOND = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])


def found(model: Any, name: str, shape: tuple[int, ...], batch: Any) -> list[bool] | None:
    assert name in dict(model.named_modules())
    mask = TokenMasks(model).find(name, torch.zeros(*shape, 3), batch)
    return None if mask is None else mask.tolist()


def bools(mask: torch.Tensor) -> list[bool]:
    return mask.bool().reshape(-1).tolist()


def test_an_encoder_and_a_decoder_of_one_length_keep_their_own_masks() -> None:
    model = FAMILIES["t5"].build()
    batch = {"attention_mask": FIRST, "decoder_attention_mask": SECOND}
    wanted = {
        "encoder.block.0.layer.0.SelfAttention.q": FIRST,
        "encoder.block.1.layer.1.DenseReluDense.wo": FIRST,
        "decoder.block.0.layer.0.SelfAttention.k": SECOND,
        "decoder.block.0.layer.1.EncDecAttention.q": SECOND,
        "decoder.block.0.layer.1.EncDecAttention.k": FIRST,
        "decoder.block.1.layer.1.EncDecAttention.v": FIRST,
        "decoder.block.1.layer.2.DenseReluDense.wi": SECOND,
    }
    for name, mask in wanted.items():
        assert found(model, name, (2, 4), batch) == bools(mask), name
    # Nothing pads a decoder's input without a mask.
    only = {"attention_mask": FIRST}
    assert found(model, "decoder.block.0.layer.0.SelfAttention.k", (2, 4), only) is None


def test_an_encoder_inside_a_vision_model_is_found() -> None:
    model = FAMILIES["instructblip-t5"].build()
    batch = {"attention_mask": FIRST, "decoder_attention_mask": SECOND}
    for part, mask in (("encoder", FIRST), ("decoder", SECOND)):
        name = f"language_model.{part}.block.0.layer.0.SelfAttention.q"
        assert found(model, name, (2, 4), batch) == bools(mask)
    assert found(model, "vision_model.encoder.layers.0.mlp.fc1", (2, 4), batch) is None


def test_every_sequence_of_a_q_former_has_its_own_mask() -> None:
    model = FAMILIES["instructblip"].build()
    text = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": FIRST, "qformer_attention_mask": text}
    layer = "qformer.encoder.layer.0"
    both = [True, True, True, True, False, *[True] * 5]  # two queries in front of the text
    assert found(model, f"{layer}.attention.attention.query", (2, 5), batch) == both
    assert found(model, f"{layer}.attention.output.dense", (2, 5), batch) == both
    assert found(model, f"{layer}.intermediate.dense", (2, 3), batch) == bools(text)
    # Queries and image tokens all count, even where they are as many as the text's.
    for name in ("crossattention.attention.key", "intermediate_query.dense"):
        for length in (2, 3, 5):
            assert found(model, f"{layer}.{name}", (2, length), batch) is None
    assert found(model, "language_projection", (2, 2), batch) is None
    inner = "language_model.model.layers.0.mlp.up_proj"
    assert found(model, inner, (2, 4), batch) == bools(FIRST)


def test_an_expert_counts_the_routed_tokens_that_are_no_padding() -> None:
    model = FAMILIES["mixtral"].build()
    x = torch.zeros(3, 3)
    x._tailor_rows = torch.tensor([0, 3, 7])
    mask = TokenMasks(model).find("model.layers.0.mlp.experts", x, {"attention_mask": FIRST})
    assert mask.tolist() == [True, False, True]


def test_a_text_without_a_fitting_mask_is_refused() -> None:
    with pytest.raises(InputError, match=r"matches no mask of the batch .* one mask entry per tok"):
        found(gpt2(), "transformer.h.0.mlp", (2, 5), {"attention_mask": FIRST})
