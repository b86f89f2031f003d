"""Many models in one run: a manifest of jobs, a table of what became of them."""

from tailor_fast.batch.manifest import JobSpec, read_manifest
from tailor_fast.batch.runner import plan_batch, run_batch
from tailor_fast.batch.state import JobState

__all__ = ["JobSpec", "JobState", "plan_batch", "read_manifest", "run_batch"]
