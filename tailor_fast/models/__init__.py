"""What a model is made of: its patchable weights, its blocks, and which tokens count.

Knows transformers, knows no op and no file.
"""

from tailor_fast.models.blocks import blocks_of
from tailor_fast.models.calling import caller
from tailor_fast.models.experts import SplitExperts, aligned, fused_targets, split_experts
from tailor_fast.models.known import known_targets
from tailor_fast.models.linears import Target, find_targets, pair_parameters, weight_view
from tailor_fast.models.original import is_original, transformers_name
from tailor_fast.models.residency import Residency
from tailor_fast.models.skeleton import (
    build_skeleton,
    map_keys,
    names_as_stored,
    refuse_fused,
    tied_names,
)
from tailor_fast.models.tokens import TokenMasks

__all__ = [
    "Residency",
    "SplitExperts",
    "Target",
    "TokenMasks",
    "aligned",
    "blocks_of",
    "build_skeleton",
    "caller",
    "find_targets",
    "fused_targets",
    "is_original",
    "known_targets",
    "map_keys",
    "names_as_stored",
    "pair_parameters",
    "refuse_fused",
    "split_experts",
    "tied_names",
    "transformers_name",
    "weight_view",
]
