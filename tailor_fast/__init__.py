"""Model Tailor as a performance library: repair a fine-tuned model's forgetting by a sparse patch.

Source of the method: Zhu et al., "Model Tailor", ICML 2024, arXiv 2402.12048.

The names below are imported when they are first used: ``import tailor_fast`` costs nothing, and the
command line answers ``--help`` without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tailor_fast._version import __version__

if TYPE_CHECKING:
    from tailor_fast._core.distributed import join_processes
    from tailor_fast.calibration import CalibrationReport, RunOptions, calibrate, save_batches
    from tailor_fast.ops import backends
    from tailor_fast.patchfile import Patch
    from tailor_fast.patching import (
        PatchPlan,
        Recipe,
        Report,
        Tailored,
        patch_checkpoint,
        plan_patch,
        tailor_model,
    )
    from tailor_fast.stitching import Task, stitch_checkpoints

_HOMES = {
    "CalibrationReport": "calibration",
    "Patch": "patchfile",
    "PatchPlan": "patching",
    "Recipe": "patching",
    "Report": "patching",
    "RunOptions": "calibration",
    "Tailored": "patching",
    "Task": "stitching",
    "backends": "ops",
    "calibrate": "calibration",
    "join_processes": "_core.distributed",
    "patch_checkpoint": "patching",
    "plan_patch": "patching",
    "save_batches": "calibration",
    "stitch_checkpoints": "stitching",
    "tailor_model": "patching",
}
_MODULES = ("batch", "errors", "evaluation", "integrations", "ops")

__all__ = [
    "CalibrationReport",
    "Patch",
    "PatchPlan",
    "Recipe",
    "Report",
    "RunOptions",
    "Tailored",
    "Task",
    "__version__",
    "backends",
    "calibrate",
    "join_processes",
    "patch_checkpoint",
    "plan_patch",
    "save_batches",
    "stitch_checkpoints",
    "tailor_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name or module when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"tailor_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tailor_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tailor_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted([*__all__, *_MODULES])
