"""What a model is made of: its patchable weights, its blocks, and which tokens count.

Knows transformers, knows no op and no file.
"""

from tailor_fast.models.blocks import blocks_of
from tailor_fast.models.calling import caller
from tailor_fast.models.known import known_targets
from tailor_fast.models.linears import Target, find_targets, pair_parameters, weight_view
from tailor_fast.models.residency import Residency
from tailor_fast.models.skeleton import build_skeleton, map_keys
from tailor_fast.models.tokens import TokenMasks

__all__ = [
    "Residency",
    "Target",
    "TokenMasks",
    "blocks_of",
    "build_skeleton",
    "caller",
    "find_targets",
    "known_targets",
    "map_keys",
    "pair_parameters",
    "weight_view",
]
