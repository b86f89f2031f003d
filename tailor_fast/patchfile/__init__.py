"""The sparse patch file: what turns one checkpoint into another, bit for bit, and back.

``diff_checkpoints`` writes it, ``apply_patch`` and ``revert_patch`` carry a checkpoint there and
back, ``Patch`` puts it on a model in memory and takes it off again, ``verify_patch`` proves it
sound. docs/patch-files.md specifies the format.
"""

from tailor_fast.patchfile.applying import Applied, apply_patch, revert_patch
from tailor_fast.patchfile.diffing import diff_checkpoints
from tailor_fast.patchfile.errors import NotPatchError, WrongStateError
from tailor_fast.patchfile.file import Patch
from tailor_fast.patchfile.inspecting import PatchInspection, StoredTensor, inspect_patch
from tailor_fast.patchfile.layout import PatchEntry, PatchPlan
from tailor_fast.patchfile.verify import PatchVerification, is_patch, verify_patch

__all__ = [
    "Applied",
    "NotPatchError",
    "Patch",
    "PatchEntry",
    "PatchInspection",
    "PatchPlan",
    "PatchVerification",
    "StoredTensor",
    "WrongStateError",
    "apply_patch",
    "diff_checkpoints",
    "inspect_patch",
    "is_patch",
    "revert_patch",
    "verify_patch",
]
