"""One run over checkpoints on disk: what was asked for, and the walk over the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Batch
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import Statistics, is_statistics, open_statistics
from tailor_fast.calibration.streamed import StreamedModel, attach, skeleton_of
from tailor_fast.checkpoint import Layout, StagedCheckpoint, plan_layout
from tailor_fast.models import Target, caller
from tailor_fast.patching.datafree import DataFree, copy_rest
from tailor_fast.patching.engine import Engine
from tailor_fast.patching.inputs import Given, resolve
from tailor_fast.patching.memory import divide_memory
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.plan import PatchPlan, make_plan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.solver import Solver, units_of
from tailor_fast.patching.sources import BLOCK_BYTES, Sources, open_sources
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

    Attributes:
        recipe: as it is run with the data at hand.
        report: filled in.
    """

    def __init__(self, request: Request, progress: Progress | None) -> None:
        self.request = request
        self.progress = progress or Silent()
        self.report = Report(request.recipe.model_dump())
        self._stack = ExitStack()
        self._statistics: Statistics | None = None
        self._old_statistics: Statistics | None = None
        self.recipe = request.recipe

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
            sources = stack.enter_context(
                open_sources(request.base, request.tuned, self.recipe, runs_model=runs_model)
            )
            infos = sources.tuned.checkpoint.tensors.values()
            shard = request.options.max_shard_bytes
            yield sources, plan_layout(infos, max_shard_bytes=shard)

    def plan(self, sources: Sources, layout: Layout) -> PatchPlan:
        """Plan the run; refuses what cannot fit.

        Raises:
            UsageError: ``max_ram`` is less than the largest block and its statistics take.
        """
        plan = make_plan(
            sources,
            layout,
            self.recipe,
            given=self._given(),
            max_ram=self.request.options.max_ram,
            notes=self.report.notes,
        )
        limit = self.request.options.max_ram
        if limit is not None and plan.ram > limit:
            raise UsageError(
                f"max_ram of {limit} bytes is too little: the largest block and its statistics take"
                f" {plan.ram}; expected more, or fewer layers (`targets`), or propagate 'none'"
            )
        return plan

    def run(self, sources: Sources, staged: StagedCheckpoint, writer: Writer) -> None:
        """Write every tensor of the output; the last may be on their way to disk at the end."""
        plan = self.plan(sources, staged.layout)
        self.report.notes[:] = plan.notes
        with torch.no_grad():
            if self.request.calibration is None and self._statistics is None:
                self._without_data(sources, staged, writer)
            else:
                self._with_data(sources, staged, writer, plan)

    def _without_data(self, sources: Sources, staged: StagedCheckpoint, writer: Writer) -> None:
        targets = {layer.target.name: layer.target for layer in sources.layers}
        memory = divide_memory(sources, self.recipe, self.request.options.max_ram)
        device = torch.device(self.request.options.device)
        units = self._units(sources, targets)
        self.progress.start(len(targets))
        run = DataFree(sources, self.recipe, units, self.report, memory, device)
        run.run(staged, writer, self.progress.group)

    def _with_data(
        self, sources: Sources, staged: StagedCheckpoint, writer: Writer, plan: PatchPlan
    ) -> None:
        device = torch.device(self.request.options.device)
        layers = [layer for layer in sources.layers if not sources.equal(layer.tensor)]
        self.report.note_equal(len(sources.layers) - len(layers), len(sources.layers))
        named = {layer.target.name: layer for layer in layers}
        weights = StreamedWeights(sources, writer, named, device)
        targets = {name: layer.target for name, layer in named.items()}
        units = self._units(sources, targets)
        solver = Solver(self.recipe, weights, targets, units, self.report)
        self._check_statistics(sources)
        if self._statistics is None:
            self._from_samples(weights, solver, plan)
        else:
            self._from_statistics(weights, solver, self._statistics)
        for row in self.report.linears:
            row.tensor = named[row.name].tensor
        names = [name for shard in staged.layout.shards for name in shard.tensors]
        rest = [name for name in names if name not in weights.written]
        copy_rest(sources, writer, rest, self.recipe)

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
                statistics.check_model(source.root(bytearray(BLOCK_BYTES)), role)

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

    def _from_statistics(
        self, weights: StreamedWeights, solver: Solver, statistics: Statistics
    ) -> None:
        names = list(weights.layers)
        device = weights.device
        groups = statistics.grouped(names)
        solver.leave([n for n in names if n not in statistics], "the statistics have no entry")
        if solver.needs_scores_first:
            for group in groups:
                new, old = statistics.moments(group[0], device), self._old_moments(group)
                if new is not None:
                    solver.score(group, new, old)
            solver.finish_scores()
        self.progress.start(len(groups))
        told = self._told(weights)
        for done, group in enumerate(groups, 1):
            new = statistics.moments(group[0], device)
            if new is None:
                solver.leave(group, "no counted token reaches it")
            else:
                solver.solve(group, new, self._old_moments(group))
            told(group[0], done, len(groups))

    def _from_samples(self, weights: StreamedWeights, solver: Solver, plan: PatchPlan) -> None:
        sources, device, recipe = weights.sources, weights.device, self.recipe
        keys = sources.keys
        tuned = StreamedModel(sources.tuned, keys, device)
        new = self._batches(self.request.calibration, tuned, device) or []
        old = None
        if self._old_statistics is None:
            old = self._batches(self.request.retain, tuned, device)
        base = None if old is None else StreamedModel(sources.base, keys, device)
        if recipe.propagate != "none":
            # What is not patched runs as it will be written.
            rest = sources.base if recipe.untouched == "base" else sources.tuned
            weights.patched = StreamedModel(rest, keys, device)
        patched = weights.patched or tuned  # not run without propagation
        models = ((base or tuned).model, tuned.model, patched.model)
        streams = make_streams(recipe, models, (new, old), caller(tuned.model))
        with ExitStack() as stack:
            attach(stack, tuned, base, weights.patched)
            self.progress.note("finding the input groups")
            groups = discover(streams.tuned, weights.layers, tuned.residency.blocks)
            tuned.residency.release()
            self.progress.start(len(groups.sites))
            engine = Engine(solver, groups, streams, by_block=recipe.group == "block")
            if self._old_statistics is not None:
                engine.old_moments = self._old_moments
            engine.spill = self._spill(plan, stack)
            engine.progress = self._told(weights)
            engine.run()

    def _batches(
        self, path: Path | None, model: StreamedModel, device: torch.device
    ) -> list[Batch] | None:
        if path is None:
            return None
        data = read_data(path, self.request.tuned, model, self.request.options, device)
        if data.note:
            self.report.notes.append(data.note)
        return data.batches

    def _spill(self, plan: PatchPlan, stack: ExitStack) -> ActivationSpill | None:
        limit = self.request.options.max_ram
        if limit is None:
            return None
        spill = ActivationSpill(limit - plan.ram, self.request.out.absolute().parent)
        stack.callback(spill.close)
        return spill

    def _told(self, weights: StreamedWeights) -> Callable[[str, int, int], None]:
        sizes = weights.sources.tuned.checkpoint.tensors

        def told(name: str, done: int, total: int) -> None:
            written = sum(sizes[tensor].nbytes for tensor in weights.written)
            self.progress.group(name, done, total, written)

        return told
