"""The ``select`` op in Triton: one pass over the pair in the common case, no host round trip.

A sample gives an interval of keys that should hold the threshold. One pass scores every element,
marks what lies above the interval and lists the few inside (``bracket.py``); the threshold is then
found among the lists by a radix descent that stays on the device (``lists.py``, ``state.py``). One
grid takes as many tensors as fit (``table.py``), so launches do not show in small ones.
Counts prove the answer; where they do not, or where a tile has too many candidates, the descent
over all elements follows (``whole.py``). Rows are searched on chip (``rows.py``). The bits are
those of the ``reference`` package (``scores.py``, ``moments.py``).
"""

from tailor_fast.ops.select.triton.counting import (
    count_keys_,
    mark_pair_,
    score_pair,
    tensor_affine,
)
from tailor_fast.ops.select.triton.forms import kernels
from tailor_fast.ops.select.triton.masks import select_patch, select_patches, topk_mask

__all__ = [
    "count_keys_",
    "kernels",
    "mark_pair_",
    "score_pair",
    "select_patch",
    "select_patches",
    "tensor_affine",
    "topk_mask",
]
