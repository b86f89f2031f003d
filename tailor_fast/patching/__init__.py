"""The main job: two models in, the base model with a sparse, decorated patch out."""

from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.plan import PatchPlan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.tailor import Tailored, tailor_model

__all__ = [
    "PatchPlan",
    "Recipe",
    "Report",
    "Tailored",
    "patch_checkpoint",
    "plan_patch",
    "tailor_model",
]
