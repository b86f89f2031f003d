"""Lays one run over checkpoints out on its device: sizes from headers and data, no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tailor_fast._core.machine import hold_to
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.placement import ON_DEVICE
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import is_statistics
from tailor_fast.calibration.streamed import run_dtype, skeleton_of
from tailor_fast.calibration.token_buffer import TOKENS_AT_ONCE
from tailor_fast.calibration.tracing import Lane, trace_lanes
from tailor_fast.patching.device import Walk, plan_device, statistics_bytes
from tailor_fast.patching.inputs import Given
from tailor_fast.patching.plan import PatchPlan, host_bytes
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.sources import Sources

_UNBOUNDED = 1 << 62


def fit_run(
    sources: Sources,
    plan: PatchPlan,
    recipe: Recipe,
    given: Given,
    options: RunOptions,
    data: Sequence[Path | None],
    share: Callable[[int], slice],
    notes: list[str],
) -> PatchPlan:
    """Choose how a run fits on its device, and count a running pass where models run on the CPU.

    Args:
        sources: the open pair.
        plan: of the run.
        recipe: as it is run.
        given: the data at hand.
        options: of the run.
        data: the files of samples; what is none is passed over.
        share: which of how many batches are this process's.
        notes: gets a sentence where activations cannot be planned.

    Returns:
        The plan, with ``device`` where something bounds that.

    Raises:
        UsageError: it does not fit.
    """
    device = torch.device(options.device)
    limit = hold_to(options.max_vram, device)
    files = [path for path in data if path is not None and not is_statistics(path)]
    passes = bool(files) and device.type == "cpu"
    if limit is None and not passes:
        return plan
    layers = [(layer.target.name, *layer.shape) for layer in sources.layers]
    names = [name for name, _, _ in layers]
    walk = _walk(sources, plan, recipe, given, options, _Data(files, share, names), notes)
    if passes:
        waiting = min(TOKENS_AT_ONCE, walk.tokens)  # pages that no token reaches are not resident
        taken = max(
            statistics_bytes(walk, name, cols, ON_DEVICE, waiting) for name, _, cols in layers
        )
        plan = replace(plan, ram_solve=max(plan.ram_solve, taken - plan.ram_weights))
    return plan if limit is None else replace(plan, device=plan_device(walk, layers, limit))


class _Data(NamedTuple):
    """Files of samples, this process's share of their batches, and who asks for their inputs."""

    files: Sequence[Path]
    share: Callable[[int], slice]
    layers: Sequence[str]


def _walk(
    sources: Sources,
    plan: PatchPlan,
    recipe: Recipe,
    given: Given,
    options: RunOptions,
    data: _Data,
    notes: list[str],
) -> Walk:
    lanes, inputs, word, counts = dict[str, Lane](), 0, 4, [0]
    if data.files:
        model, cpu = skeleton_of(sources.tuned), torch.device("cpu")
        processor = sources.tuned.checkpoint.processor_directory or sources.tuned.checkpoint.path
        read = [read_data(path, processor, model, options, cpu, data.share) for path in data.files]
        batches = [batch for one in read for batch in one.batches]
        tensors = (t for b in batches for t in b.values() if isinstance(t, torch.Tensor))
        inputs, word = sum(t.nbytes for t in tensors), run_dtype(model).itemsize
        counts = [sum(b["input_ids"].numel() for b in one.batches) for one in read]
        lanes, why = trace_lanes(model, batches, data.layers)
        if why:
            notes.append(f"activations of a running pass are not in the plan: {why}")
    exact = recipe.decorate == "exact"
    return Walk(
        recipe=recipe,
        device=torch.device(options.device).type,
        word=word,
        weights=plan.ram_weights,
        inputs=inputs,
        paired=bool(data.files) and recipe.propagate == "asymmetric" and exact,
        old_samples=given.old_samples,
        old=given.old and exact,
        lanes=lanes,
        tokens=max(counts),
    )


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
