"""A factor of ``decorate_obs`` as the tensors in which it passes from one call to the next."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor

BLOCK = 128  # rows and columns of a diagonal block


class Packed(NamedTuple):
    """The tensors of ``ObsFactor``."""

    upper: Tensor
    inverses: Tensor
    damping: Tensor


def pack(
    gram: Tensor, upper: Tensor | None, inverses: Tensor | Sequence[Tensor], damping: float
) -> Packed:
    """Pack the factor of ``gram``.

    Args:
        gram: float32 ``[cols, cols]``.
        upper: float32 ``[cols, cols]``; None where the Gram is 0.
        inverses: the diagonal blocks, at most ``[BLOCK, BLOCK]`` each; there may be none.
        damping: λ.
    """
    shape = (-(-len(gram) // BLOCK), BLOCK, BLOCK)
    if isinstance(inverses, Tensor) and inverses.shape == shape:
        blocks = inverses
    else:
        blocks = gram.new_zeros(shape)
        for block, inverse in zip(blocks, inverses, strict=False):
            block[: len(inverse), : len(inverse)] = inverse
    found = math.nan if upper is None else damping
    return Packed(
        torch.zeros_like(gram) if upper is None else upper,
        blocks,
        torch.tensor(found, dtype=torch.float64, device=gram.device),
    )


def unpack(factor: Sequence[Tensor]) -> tuple[Tensor | None, Tensor, float]:
    """R, None where the Gram is 0; the blocks; λ, 0 there."""
    upper, inverses, damping = factor
    value = damping.item()
    return (None, inverses[:0], 0.0) if math.isnan(value) else (upper, inverses, value)
