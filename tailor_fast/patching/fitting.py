"""Lays one run over checkpoints out on its device: sizes from headers and data, no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from tailor_fast._core.machine import hold_to
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import is_statistics
from tailor_fast.calibration.streamed import run_dtype, skeleton_of
from tailor_fast.calibration.tracing import Lane, trace_lanes
from tailor_fast.patching.device import DevicePlan, Walk, plan_device
from tailor_fast.patching.inputs import Given
from tailor_fast.patching.plan import PatchPlan, host_bytes
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.sources import Sources

_UNBOUNDED = 1 << 62


def fit_device(
    sources: Sources,
    plan: PatchPlan,
    recipe: Recipe,
    given: Given,
    options: RunOptions,
    data: Sequence[Path | None],
    share: Callable[[int], slice],
    notes: list[str],
) -> DevicePlan | None:
    """Choose how a run fits on its device; None where nothing bounds it.

    Args:
        sources: the open pair.
        plan: of the run.
        recipe: as it is run.
        given: the data at hand.
        options: of the run.
        data: the files of samples; what is none is passed over.
        share: which of how many batches are this process's.
        notes: gets a sentence where activations cannot be planned.

    Raises:
        UsageError: it does not fit.
    """
    device = torch.device(options.device)
    limit = hold_to(options.max_vram, device)
    if limit is None:
        return None
    lanes, inputs, word, counts = dict[str, Lane](), 0, 4, [0]
    layers = [(layer.target.name, *layer.shape) for layer in sources.layers]
    files = [path for path in data if path is not None and not is_statistics(path)]
    if files:
        model, cpu = skeleton_of(sources.tuned), torch.device("cpu")
        processor = sources.tuned.checkpoint.processor_directory or sources.tuned.checkpoint.path
        read = [read_data(path, processor, model, options, cpu, share) for path in files]
        batches = [batch for one in read for batch in one.batches]
        tensors = (t for b in batches for t in b.values() if isinstance(t, torch.Tensor))
        inputs, word = sum(t.nbytes for t in tensors), run_dtype(model).itemsize
        counts = [sum(b["input_ids"].numel() for b in one.batches) for one in read]
        lanes, why = trace_lanes(model, batches, [name for name, _, _ in layers])
        if why:
            notes.append(f"activations are not in the plan of the device: {why}")
    exact = recipe.decorate == "exact"
    walk = Walk(
        recipe=recipe,
        device=device.type,
        word=word,
        weights=plan.ram_weights,
        inputs=inputs,
        paired=bool(files) and recipe.propagate == "asymmetric" and exact,
        old_samples=given.old_samples,
        old=given.old and exact,
        lanes=lanes,
        tokens=max(counts),
    )
    return plan_device(walk, layers, limit)


def spill_of(
    stack: ExitStack, plan: PatchPlan, options: RunOptions, held: int, out: Path
) -> ActivationSpill | None:
    """Where suspended activations go until ``stack`` ends; None where nothing bounds them.

    Args:
        stack: closes it.
        plan: of the run.
        options: of the run.
        held: bytes of the machine's memory that are kept for other runs.
        out: the output, beside which a file is made.
    """
    left, most = None if plan.device is None else plan.device.left, options.max_ram
    if most is None and left is None:
        return None
    taken = host_bytes(plan, torch.device(options.device)) + held
    budget = _UNBOUNDED if most is None else most - taken
    spill = ActivationSpill(budget, out.absolute().parent, left)
    stack.callback(spill.close)
    return spill
