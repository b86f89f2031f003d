"""Second moments of a layer's inputs: full, cross and diagonal Gram."""

from tailor_fast.ops.gram.api import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)

__all__ = ["accumulate_cross_gram_", "accumulate_gram_", "accumulate_gram_diag_"]
