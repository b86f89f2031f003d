"""Several fine-tunes of one base in one model: one sparse patch that serves all their tasks."""

from tailor_fast.stitching.job import stitch_checkpoints
from tailor_fast.stitching.support import Support
from tailor_fast.stitching.tasks import Task

__all__ = ["Support", "Task", "stitch_checkpoints"]
