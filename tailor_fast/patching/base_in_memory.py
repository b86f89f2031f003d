"""Whether a base stays in memory for the jobs that are patched from it after this one."""

from __future__ import annotations

from collections.abc import Callable

from tailor_fast._core.machine import memory
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import Held, shown_size
from tailor_fast.patching.plan import PatchPlan


def room_for_base(plan: PatchPlan, options: RunOptions, held: int = 0) -> int:
    """Bytes that a base may take in memory beside a run: half of what the run leaves.

    The other half is for activations, and for the system's copies of files.

    Args:
        plan: of the run.
        options: of the run; ``max_ram`` counts where it is less than the memory that is free.
        held: bytes of the base that are in memory already.
    """
    left = memory()[0] + held - plan.ram_peak
    if options.max_ram is not None:
        left = min(left, options.max_ram - plan.ram)
    return max(0, left // 2)


def kept(need: int, jobs: int) -> str:
    """The note about a base that is read once for ``jobs`` jobs."""
    return f"the base is read once for {jobs} jobs and kept in memory ({shown_size(need)})"


def too_large(need: int, room: int) -> str:
    """The note about a base that is read by each job."""
    return (
        f"the base is not kept in memory for other jobs: it takes {shown_size(need)}, and"
        f" {shown_size(room)} are left for it (half of what `max_ram` or the machine leaves beside"
        " the job)"
    )


def hold_base(
    held: Held | None, plan: PatchPlan, options: RunOptions, told: Callable[[str], None]
) -> None:
    """Keep the base in memory where there is room, else give back what was kept of it.

    Args:
        held: opened the base; None does nothing.
        plan: of the run that is about to start.
        options: of that run.
        told: takes a sentence when the base is not kept.
    """
    if held is None:
        return
    room = room_for_base(plan, options, held.kept_bytes)
    if held.size > room or not held.keep():
        held.drop()
        told(too_large(held.size, room))
