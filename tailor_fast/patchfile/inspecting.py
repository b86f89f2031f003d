"""What a patch file says of itself, from its header alone."""

from dataclasses import dataclass
from typing import Any

from tailor_fast.checkpoint import shown_size
from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.patchfile.file import Patch
from tailor_fast.patchfile.layout import FORMAT


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor that the patch changes.

    Attributes:
        name: as in the checkpoints.
        dtype: the format's name.
        shape: sizes.
        words: words of the tensor.
        changed: how many of them the patch changes.
        nbytes: bytes in the file.
        base: digest before.
        target: digest afterwards.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    words: int
    changed: int
    nbytes: int
    base: str
    target: str


@dataclass(frozen=True, slots=True)
class PatchInspection:
    """What was found.

    Attributes:
        facts: names and values in a few words.
        tensors: what the patch changes, by name.
    """

    facts: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def inspect_patch(path: AnyPath) -> PatchInspection:
    """Look at a patch file; no stored word is read.

    Raises:
        InputError: it cannot be read, is no patch file, or breaks a rule of the format.
    """
    with Patch.open(path) as patch:
        plan = patch.plan
        share = 100 * plan.changed / plan.words if plan.words else 0.0
        facts = {
            "path": path,
            "format": FORMAT,
            "base": f"{plan.base_name}, {plan.digest} {plan.base_root}",
            "target": f"{plan.target_name}, {plan.digest} {plan.target_root}",
            "changed": f"{share:.2f}%, {plan.changed:,} of {plan.words:,} weights in {len(patch):,}"
            f" of {len(plan.entries):,} tensors",
            "size": shown_size(patch.nbytes),
        }
        tensors = tuple(
            StoredTensor(
                entry.name,
                entry.dtype,
                entry.shape,
                entry.words,
                entry.changed,
                entry.stored_bytes,
                entry.base,
                entry.target,
            )
            for entry in patch.values()
        )
        return PatchInspection(facts, tensors)
