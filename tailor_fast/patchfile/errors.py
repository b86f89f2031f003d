"""Errors of patch files that no other file has; each is one sentence and exit code 65."""

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint import CheckpointError


class NotPatchError(CheckpointError, InputError):
    """A safetensors file that is no patch, or a patch of another version."""


class WrongStateError(CheckpointError, InputError):
    """Weights that are neither what the patch starts from nor what it leads to."""
