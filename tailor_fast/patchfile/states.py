"""Which state weights are in: what a patch starts from, what it leads to, or neither.

A patch is its own inverse, so that applying it twice would take it back unseen. The digest of every
tensor decides instead, and nothing overrides it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tailor_fast.checkpoint import MalformedError
from tailor_fast.checkpoint.errors import AnyPath, quoted
from tailor_fast.patchfile.errors import WrongStateError
from tailor_fast.patchfile.layout import PatchEntry


@dataclass(frozen=True, slots=True)
class Direction:
    """From ``base`` to ``target`` or back; the names are those of a ``PatchEntry``'s digests."""

    start: str
    goal: str

    def start_of(self, entry: PatchEntry) -> str:
        """Digest that the tensor must have before."""
        return entry.base if self.start == "base" else entry.target

    def goal_of(self, entry: PatchEntry) -> str:
        """Digest that it has afterwards."""
        return entry.target if self.start == "base" else entry.base


APPLY: Final = Direction("base", "target")
REVERT: Final = Direction("target", "base")


def must_change(
    found: Iterable[tuple[PatchEntry, str]], direction: Direction, path: AnyPath | None
) -> bool:
    """Decide by the digests of some or all tensors of one model.

    Args:
        found: tensors with the digests that they have.
        direction: what is to be done.
        path: where they lie; None in memory.

    Returns:
        True when all are at the start, False when all are at the goal already.

    Raises:
        WrongStateError: a tensor is at neither, or some are here and some there.
    """
    at_start: PatchEntry | None = None
    at_goal: PatchEntry | None = None
    for entry, digest in found:
        start, goal = direction.start_of(entry), direction.goal_of(entry)
        if digest not in (start, goal):
            problem = f"digest must be {start}, that of the patch's {direction.start}"
            problem += "" if start == goal else f", or {goal}, that of its {direction.goal}"
            remedy = "give the very weights that the patch was made from"
            raise WrongStateError(
                f"{problem}; got {digest}", path=path, tensor=entry.name, remedy=remedy
            )
        if entry.changed and digest == start:
            at_start = at_start or entry
        elif entry.changed:
            at_goal = at_goal or entry
    if at_start is not None and at_goal is not None:
        problem = (
            f"is the patch's {direction.goal} already, but {quoted(at_start.name)} is still its"
            f" {direction.start}"
        )
        remedy = "give weights that are wholly one or the other"
        raise WrongStateError(problem, path=path, tensor=at_goal.name, remedy=remedy)
    return at_goal is None


def wrong_result(path: AnyPath, name: str, expected: str, got: str) -> MalformedError:
    """The error of a patch whose words turn the right weights into something else."""
    problem = f"the patch must turn it into digest {expected}; got {got}"
    remedy = "the patch is damaged: fetch it again, or make it again with `tailor-fast diff`"
    return MalformedError(problem, path=path, tensor=name, remedy=remedy)
