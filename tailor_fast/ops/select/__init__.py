"""Which weights to keep: top-k masks of scores, of a tensor pair, and of many tensors together."""

from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.api import select_patch, select_patches, topk_mask
from tailor_fast.ops.select.selector import TopKSelector

__all__ = ["TopKSelector", "kept_count", "select_patch", "select_patches", "topk_mask"]
