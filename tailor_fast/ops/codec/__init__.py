"""Sparse patches of raw words: where two tensors differ, and the XOR between them."""

from tailor_fast.ops.codec.api import EncodedPatch, apply_patch_, encode_patch

__all__ = ["EncodedPatch", "apply_patch_", "encode_patch"]
