"""``torch.library`` registration of the ``codec`` op. Imports no backend until one is called."""

import torch

from tailor_fast._core.backend import Order, implementation
from tailor_fast._core.library import register
from tailor_fast.ops.codec.layout import WORD_DTYPES, block_count, mask_bytes

ORDER: Order = {"cpu": ("native", "reference", "triton"), "cuda": ("triton", "reference")}

_Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _encode(
    base: torch.Tensor, tuned: torch.Tensor, mask: torch.Tensor | None, backend: str
) -> _Encoded:
    module = implementation("codec", ORDER, backend, base.device.type)
    encoded: _Encoded = module.encode_patch(base, tuned, mask)
    return encoded


def _encode_fake(base: torch.Tensor, *_: object) -> _Encoded:
    size = base.numel()
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        base.new_empty(mask_bytes(size), dtype=torch.uint8),
        base.new_empty(found, dtype=WORD_DTYPES[base.element_size()]),
        base.new_empty(block_count(size), dtype=torch.int32),
    )


def _apply(
    target: torch.Tensor,
    mask: torch.Tensor,
    words: torch.Tensor,
    blocks: torch.Tensor,
    backend: str,
) -> None:
    module = implementation("codec", ORDER, backend, target.device.type)
    module.apply_patch_(target, mask, words, blocks)


def _apply_fake(*_: object) -> None:
    return None


register(
    "encode_patch(Tensor base, Tensor tuned, Tensor? mask, str backend)"
    " -> (Tensor mask, Tensor words, Tensor blocks)",
    _encode,
    _encode_fake,
)
register(
    "apply_patch_(Tensor(a!) target, Tensor mask, Tensor words, Tensor blocks, str backend) -> ()",
    _apply,
    _apply_fake,
)
