"""One run over checkpoints on disk: what was asked for, and the walk over the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Batch
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.placement import ON_DEVICE
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import Statistics, is_statistics, open_statistics
from tailor_fast.calibration.streamed import StreamedModel, attach, skeleton_of
from tailor_fast.checkpoint import Held, Layout, Resume, StagedCheckpoint, plan_layout
from tailor_fast.models import Target, caller
from tailor_fast.patching.ahead import plan_ahead, reading_ahead
from tailor_fast.patching.base_in_memory import hold_base
from tailor_fast.patching.datafree import DataFree, copy_rest
from tailor_fast.patching.engine import Engine
from tailor_fast.patching.fitting import fit_run, spill_of
from tailor_fast.patching.forgetting import settle_retain_weight
from tailor_fast.patching.from_statistics import solve_from_statistics
from tailor_fast.patching.head_passes import run_by_blocks
from tailor_fast.patching.inputs import Given, resolve
from tailor_fast.patching.memory import divide_memory
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.plan import PatchPlan, check_plan, make_plan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.resuming import Ledger, resume_of
from tailor_fast.patching.shared import Discard, SharedLedger
from tailor_fast.patching.solver import Solver, units_of
from tailor_fast.patching.sources import Sources, check_owner, open_sources
from tailor_fast.patching.streamed import StreamedWeights
from tailor_fast.patching.tailor import make_streams

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Request:
    """What the caller asked for."""

    base: Path
    tuned: Path
    out: Path
    recipe: Recipe
    calibration: Path | None
    statistics: Path | None
    retain: Path | None
    options: RunOptions


class Job:
    """One run.

    Args:
        request: what was asked for.
        progress: told about each step.
        held: keeps what is read of the base for the next run.

    Attributes:
        recipe: as it is run with the data at hand.
        report: filled in.
        processes: do the run together; process 0 writes.
        make_solver: gives what solves each group.
    """

    def __init__(
        self, request: Request, progress: Progress | None, held: Held | None = None
    ) -> None:
        self.request = request
        self._held = held
        self.processes, self.progress = ALONE, progress or Silent()
        self.make_solver: Callable[..., Solver] = Solver
        self.report = Report(request.recipe.model_dump())
        self._stack = ExitStack()
        self._statistics: Statistics | None = None
        self._old_statistics: Statistics | None = None
        self._written: set[str] = set()
        self.recipe = request.recipe

    def join(self, processes: Processes) -> None:
        """Do the run together with other processes.

        Raises:
            UsageError: there is nothing that they could share.
        """
        request = self.request
        if processes.count > 1 and request.calibration is None and request.statistics is None:
            raise UsageError(
                f"without data there is nothing to share; got {processes.count} processes; expected"
                " one; start it without torchrun, or give calibration data"
            )
        self.processes, self.report.processes = processes, processes.count

    @contextmanager
    def opened(self) -> Iterator[tuple[Sources, Layout]]:
        """Open all inputs, settle the recipe and lay the output out; reads headers only."""
        request = self.request
        with self._stack as stack:
            if request.statistics is not None:
                self._statistics = stack.enter_context(open_statistics(request.statistics))
            if request.retain is not None and is_statistics(request.retain):
                self._old_statistics = stack.enter_context(open_statistics(request.retain))
            self.recipe = resolve(request.recipe, self._given(), self.report)
            runs_model = request.calibration is not None
            pair = (request.base, request.tuned, self.recipe)
            opened = open_sources(*pair, runs_model=runs_model, joins=True, held=self._held)
            sources = stack.enter_context(opened)
            infos = sources.joined.tensors.values()
            shard = request.options.max_shard_bytes
            yield sources, plan_layout(infos, max_shard_bytes=shard)

    def plan(self, sources: Sources, layout: Layout) -> PatchPlan:
        """Plan the run; refuses what cannot fit.

        Raises:
            UsageError: ``max_ram`` is less than the largest block and its statistics take, or
                more than the machine has; the machine or the GPU has less than the run takes.
        """
        plan = make_plan(
            sources,
            layout,
            self.recipe,
            given=self._given(),
            max_ram=self.request.options.max_ram,
            device=torch.device(self.request.options.device).type,
            notes=self.report.notes,
        )
        with_data = self.request.calibration is not None or self._statistics is not None
        if with_data:
            data = (self.request.calibration, self.request.retain)
            known = (plan, self.recipe, self._given(), self.request.options, data)
            plan = fit_run(sources, *known, self.processes.share, self.report.notes)
            plan = plan_ahead(sources, plan, self._given(), self.request.options)
        return check_plan(plan, self.request.options, with_data=with_data)

    def resume(self, sources: Sources, layout: Layout) -> Resume:
        """Whether, and from what, the run may go on."""
        request = self.request
        data = {"calibration": request.calibration, "statistics": request.statistics}
        data["retain"] = request.retain
        count = self.processes.count
        return resume_of(request.options, self.recipe, sources, layout, data, processes=count)

    def run(
        self, sources: Sources, staged: StagedCheckpoint, writer: Writer, ledger: Ledger
    ) -> None:
        """Patch every layer; the last may be on their way to disk at the end."""
        plan = self.plan(sources, staged.layout)
        self.report.notes[:] = plan.notes
        hold_base(self._held, plan, self.request.options, self.report.notes.append)
        if ledger.earlier:
            note = f"{len(ledger.earlier)} of {len(staged.layout.tensors)} tensors"
            self.report.notes.append(f"{note} were finished by an earlier run")
            self.progress.note(self.report.notes[-1])
        with torch.no_grad():
            if self.request.calibration is None and self._statistics is None:
                self._without_data(sources, staged, writer, ledger)
            else:
                self._written = self._solve(sources, writer, plan, ledger)

    def write_rest(
        self, sources: Sources, staged: StagedCheckpoint, writer: Writer, ledger: Ledger
    ) -> None:
        """Write what ``run`` did not; the report is complete before."""
        if self.request.calibration is None and self._statistics is None:
            return  # every tensor was written in its turn
        names = [name for shard in staged.layout.shards for name in shard.tensors]
        done = self._written | ledger.earlier
        copy_rest(sources, writer, [name for name in names if name not in done])

    def _without_data(
        self, sources: Sources, staged: StagedCheckpoint, writer: Writer, ledger: Ledger
    ) -> None:
        targets = {layer.target.name: layer.target for layer in sources.layers}
        memory = divide_memory(sources, self.recipe, self.request.options.max_ram)
        device = torch.device(self.request.options.device)
        units = self._units(sources, targets)
        self.progress.start(len(targets))
        run = DataFree(sources, self.recipe, units, self.report, memory, device, ledger)
        run.run(staged, writer, self.progress.group)

    def follow(self, sources: Sources, layout: Layout) -> None:
        """Take part in the run that process 0 writes."""
        plan = self.plan(sources, layout)
        self.report.notes[:] = plan.notes
        with torch.no_grad():
            self._solve(sources, Discard(), plan, None)

    def _solve(
        self,
        sources: Sources,
        writer: Writer | Discard,
        plan: PatchPlan,
        ledger: Ledger | None,
    ) -> set[str]:
        """Patch every layer; returns the tensors written."""
        device, processes = torch.device(self.request.options.device), self.processes
        layers = [layer for layer in sources.layers if not sources.equal(layer.tensor)]
        self.report.note_equal(len(sources.layers) - len(layers), len(sources.layers))
        named = {layer.target.name: layer for layer in layers}
        what = [self.recipe.model_dump(), list(named), list(sources.tuned.checkpoint.tensors)]
        processes.agree("recipe and checkpoints", what)
        if ledger is None or processes.count > 1:
            shared: Ledger | SharedLedger = SharedLedger(ledger, sources, processes)
        else:
            shared = ledger
        weights = StreamedWeights(sources, writer, named, device, shared)
        targets = {name: layer.target for name, layer in named.items()}
        units = self._units(sources, targets)
        if self.recipe.retain_weight is None:
            self.recipe = self._settled(sources, plan)
        solver = self.make_solver(self.recipe, weights, targets, units, self.report, processes)
        if plan.device is not None:
            solver.solved_at_once = plan.device.placement.solved_at_once
        if processes.rank == 0:
            self._check_statistics(sources)
        with reading_ahead(weights, plan, self._given()):
            if self._statistics is None:
                self._from_samples(weights, solver, plan)
            else:
                walk = (self._old_moments, self.progress, weights.told(self.progress))
                solve_from_statistics(weights, solver, self._statistics, *walk)
        for row in self.report.linears:
            row.tensor = named[row.name].tensor
        if processes.count > 1:
            self.report.seconds["exchange"] = processes.seconds
        return weights.written

    def _given(self) -> Given:
        kind = None if self._statistics is None else self._statistics.header.kind
        old = None if self._old_statistics is None else self._old_statistics.header.kind
        samples = self.request.retain is not None and self._old_statistics is None
        return Given(self.request.calibration is not None, kind, samples, old)

    def _units(self, sources: Sources, targets: Mapping[str, Target]) -> dict[str, str]:
        if self.recipe.scope != "layer":
            return units_of(self.recipe, None, targets)
        return units_of(self.recipe, skeleton_of(sources.tuned), targets)

    def _check_statistics(self, sources: Sources) -> None:
        """Statistics of the new task must be TUNED's own, those of old tasks BASE's."""
        for statistics, source, role in (
            (self._statistics, sources.tuned, "TUNED"),
            (self._old_statistics, sources.base, "BASE"),
        ):
            if statistics is not None:
                check_owner(statistics, source, sources.layers, role)

    def _old_moments(self, members: Sequence[str]) -> Moments | DiagonalMoments | None:
        statistics = self._old_statistics
        if statistics is None:
            return None
        if members[0] not in statistics:
            raise InputError(
                f"{self.request.retain}: has no entry for {members[0]}; expected one for every"
                " layer that is patched; calibrate again on data that runs through it"
            )
        return statistics.moments(members[0], torch.device(self.request.options.device))

    def _from_samples(self, weights: StreamedWeights, solver: Solver, plan: PatchPlan) -> None:
        sources, device, recipe = weights.sources, weights.device, self.recipe
        keys = sources.keys
        tuned = StreamedModel(sources.tuned, keys, device)
        new, first = self._batches(self.request.calibration, tuned, device)
        old, first_old = None, 0
        if self._old_statistics is None:
            old, first_old = self._batches(self.request.retain, tuned, device)
        base = None if old is None else StreamedModel(sources.base, keys, device)
        # A process without batches runs no model: patched weights would pile up in it.
        if recipe.propagate != "none" and (new or old):
            # What is not patched runs as it will be written.
            weights.patched = StreamedModel(sources.tuned, keys, device, weights.read_unpatched)
        patched = weights.patched or tuned  # not run without propagation
        models = ((base or tuned).model, tuned.model, patched.model)
        call, firsts = caller(tuned.model), (first, first_old)
        streams = make_streams(recipe, models, (new or [], old), call, firsts)
        with ExitStack() as stack:
            attach(stack, tuned, base, weights.patched)
            self.progress.note("finding the input groups")
            blocks = tuned.residency.blocks
            groups = discover(streams.tuned, weights.layers, blocks, self.processes)
            tuned.residency.release()
            self.progress.start(len(groups.sites))
            placement = ON_DEVICE if plan.device is None else plan.device.placement
            by_block = recipe.group == "block"
            engine = Engine(solver, groups, streams, by_block, placement=placement)
            if self._old_statistics is not None:
                engine.old_moments = self._old_moments
            engine.spill = self._spill(stack, plan)
            engine.progress = weights.told(self.progress)
            engine.run()

    def _settled(self, sources: Sources, plan: PatchPlan) -> Recipe:
        """The recipe with the retention weight that the samples of old tasks call for."""
        options, device = self.request.options, torch.device(self.request.options.device)
        self.progress.note("measuring what the tuned model has changed on old tasks")
        with ExitStack() as stack:
            pair = (sources.base, sources.tuned)
            models = [StreamedModel(source, sources.keys, device) for source in pair]
            attach(stack, *models)
            spill = self._spill(stack, plan)
            asked = replace(options, tokens="asked")
            batches, _ = self._batches(self.request.retain, models[1], device, asked)
            runs = [(model.model, run_by_blocks(model, spill)) for model in models]
            told = (self.report, self.processes)
            return settle_retain_weight(self.recipe, runs, batches or [], *told)

    def _spill(self, stack: ExitStack, plan: PatchPlan) -> ActivationSpill | None:
        kept = self._held.kept_bytes if self._held else 0
        return spill_of(stack, plan, self.request.options, kept, self.request.out)

    def _batches(
        self,
        path: Path | None,
        model: StreamedModel,
        device: torch.device,
        options: RunOptions | None = None,
    ) -> tuple[list[Batch] | None, int]:
        """This process's batches, and how many others have before them."""
        if path is None:
            return None, 0
        share, options = self.processes.share, options or self.request.options
        processor = model.source.checkpoint.processor_directory or self.request.tuned
        data = read_data(path, processor, model.model, options, device, share)
        if data.note and data.note not in self.report.notes:
            self.report.notes.append(data.note)
        return data.batches, data.first
