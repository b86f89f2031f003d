"""What several processes solved of a group's layers, put together in all of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tailor_fast._core.processes import Processes
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.solving import LOSSES, Solved

_FACTS = ("kept", "iterations", *LOSSES)


def put_together(solved: Sequence[Solved], processes: Processes) -> list[torch.Tensor]:
    """Exchange the rows of some layers once: each process waits for the others one time.

    Args:
        solved: the layers, in the same order in all processes. Their reports then say what one
            process that solved all rows would say.
        processes: those that solved the rows.

    Returns:
        The weights of the layers ``[rows, cols]``.
    """
    wholes = []
    facts = torch.zeros(processes.count, len(solved), len(_FACTS), dtype=torch.float64)
    for layer, own in enumerate(solved):
        rows = own.parts[processes.rank]
        whole = own.weight.new_empty(own.report.rows, own.report.cols)
        whole[rows] = own.weight[: rows.stop - rows.start]
        wholes.append(whole)
        known = (getattr(own.report, name) for name in _FACTS)
        values = [math.nan if value is None else float(value) for value in known]
        facts[processes.rank, layer] = torch.tensor(values, dtype=torch.float64)
    with processes.exchange():
        processes.gather()  # all have solved, and have the memory
        processes.add([facts])
        for own, whole in zip(solved, wholes, strict=True):
            for rank, rows in enumerate(own.parts):
                processes.broadcast(whole[rows], rank)
    for own, told in zip(solved, facts.transpose(0, 1).tolist(), strict=True):
        _merge(own.report, told)
    return wholes


def _merge(report: LinearReport, told: Sequence[Sequence[float]]) -> None:
    """Write what the processes tell of their rows into the report of them all."""
    kept, iterations, *losses = zip(*told, strict=True)
    report.kept = int(sum(kept))
    steps = [value for value in iterations if not math.isnan(value)]
    report.iterations = int(max(steps)) if steps else None
    for name, values in zip(LOSSES, losses, strict=True):
        parts = [value for value in values if not math.isnan(value)]
        setattr(report, name, math.fsum(parts) if parts else None)
