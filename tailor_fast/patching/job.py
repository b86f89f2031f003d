"""One run over checkpoints on disk: what was asked for, and the walk over the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tailor_fast.patching.progress import Progress, Silent

from tailor_fast._core.errors import UsageError
from tailor_fast.checkpoint import Layout, StagedCheckpoint, plan_layout
from tailor_fast.models import caller
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching.engine import Engine, units_of
from tailor_fast.patching.groups import discover
from tailor_fast.patching.lockstep import Batch
from tailor_fast.patching.plan import PatchPlan, make_plan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.solving import GroupInputs, Masks, solve_layer
from tailor_fast.patching.sources import Hashed, LayerOnDisk, Sources, open_sources, run_dtype
from tailor_fast.patching.spill import ActivationSpill
from tailor_fast.patching.streamed import StreamedModel, StreamedWeights, attach
from tailor_fast.patching.tailor import make_streams, resolve

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes the result.

    Attributes:
        device: where models run and layers are solved, ``cpu`` or ``cuda:N``.
        max_ram: bytes that weights, statistics and activations may take together, beyond the
            program itself; None sets no limit.
        max_shard_bytes: size of an output file.
        overwrite: replace an existing output, once the new one is complete.
        batch_size: samples in one forward pass.
        samples: at most so many samples of each data file; None takes all.
        max_length: longest sample in tokens.
    """

    device: str = "cpu"
    max_ram: int | None = None
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    batch_size: int = 8
    samples: int | None = 128
    max_length: int = 2048


@dataclass
class Job:
    """One run: what was asked for, and what came of it."""

    base: Path
    tuned: Path
    recipe: Recipe
    calibration: Path | None
    retain: Path | None
    options: RunOptions
    progress: Progress
    report: Report

    @classmethod
    def make(
        cls,
        base: PathLike,
        tuned: PathLike,
        recipe: Recipe | None,
        calibration: PathLike | None,
        retain: PathLike | None,
        options: RunOptions | None,
        progress: Progress | None,
    ) -> Job:
        recipe = recipe or Recipe()
        report = Report(recipe.model_dump())
        resolved = resolve(recipe, calibration is not None, retain is not None, report)
        return cls(
            Path(base),
            Path(tuned),
            resolved,
            None if calibration is None else Path(calibration),
            None if retain is None else Path(retain),
            options or RunOptions(),
            progress or Silent(),
            report,
        )

    @contextmanager
    def opened(self) -> Iterator[tuple[Sources, Layout]]:
        with open_sources(self.base, self.tuned, self.recipe) as sources:
            infos = sources.tuned.checkpoint.tensors.values()
            yield sources, plan_layout(infos, max_shard_bytes=self.options.max_shard_bytes)

    def plan(self, sources: Sources, layout: Layout) -> PatchPlan:
        return make_plan(
            sources,
            layout,
            self.recipe,
            runs_model=self.calibration is not None,
            retains=self.retain is not None,
            notes=self.report.notes,
        )

    def check_memory(self, plan: PatchPlan) -> None:
        limit = self.options.max_ram
        if limit is not None and plan.ram > limit:
            raise UsageError(
                f"max_ram of {limit} bytes is too little: the largest block and its statistics take"
                f" {plan.ram}; expected more, or fewer layers (`targets`), or propagate 'none'"
            )

    def run(self, sources: Sources, staged: StagedCheckpoint, out: Path) -> StreamedWeights:
        plan = self.plan(sources, staged.layout)
        self.check_memory(plan)
        self.report.notes[:] = plan.notes
        device = torch.device(self.options.device)
        layers = self._changed(sources)
        named = {layer.target.name: layer for layer in layers}
        weights = StreamedWeights(sources, staged, named, device)
        with torch.no_grad():
            if self.calibration is None:
                self._without_data(weights)
            else:
                self._with_data(weights, plan, out)
        for row in self.report.linears:
            row.tensor = named[row.name].tensor
        return weights

    def _changed(self, sources: Sources) -> list[LayerOnDisk]:
        changed = [layer for layer in sources.layers if not sources.equal(layer.tensor)]
        same = len(sources.layers) - len(changed)
        if same:
            text = f"{same} of {len(sources.layers)} layers are equal in both: left as is"
            self.report.notes.append(text)
        return changed

    def _without_data(self, weights: StreamedWeights) -> None:
        recipe, targets = self.recipe, {n: layer.target for n, layer in weights.layers.items()}
        units = {}
        if recipe.scope in ("layer", "global"):
            units = units_of(recipe, weights.sources.skeleton(weights.sources.tuned), targets)
        masks = Masks(recipe, units)
        if masks.needs_scores_first:
            for name in targets:
                masks.add(name, None)
            masks.observe_all(targets, weights)
        self.progress.start(len(targets))
        for done, (name, target) in enumerate(targets.items()):
            inputs = GroupInputs((name,), None, None, None)
            weight, row = solve_layer(target, weights.pair(target), inputs, masks, recipe)
            weights.install(target, weight)
            self.report.linears.append(row)
            self.progress.group(name, done + 1, len(targets), self._bytes(weights))

    def _with_data(self, weights: StreamedWeights, plan: PatchPlan, out: Path) -> None:
        sources, device = weights.sources, weights.device
        tuned = StreamedModel(sources, sources.tuned, device)
        base = None if self.retain is None else StreamedModel(sources, sources.base, device)
        if self.recipe.propagate != "none":
            weights.patched = StreamedModel(sources, self._patched_source(sources), device)
        patched = weights.patched
        new = self._batches(self.calibration, tuned, device)
        old = self._batches(self.retain, tuned, device)
        models = (
            tuned.model if base is None else base.model,
            tuned.model,
            tuned.model if patched is None else patched.model,
        )
        targets = {name: layer.target for name, layer in weights.layers.items()}
        streams = make_streams(self.recipe, models, (new or [], old), caller(tuned.model))
        with ExitStack() as stack:
            attach(stack, tuned, base, patched)
            self.progress.note("finding the input groups")
            groups = discover(streams.tuned, targets, tuned.residency.blocks)
            self.progress.start(len(groups.sites))
            engine = Engine(self.recipe, weights, targets, groups, streams, self.report)
            engine.spill = self._spill(plan, out, stack)
            engine.progress = lambda name, done, total: self.progress.group(
                name, done, total, self._bytes(weights)
            )
            engine.run()

    def _patched_source(self, sources: Sources) -> Hashed:
        """Parameters that are not patched come from where the output takes them."""
        return sources.base if self.recipe.untouched == "base" else sources.tuned

    def _batches(
        self, path: Path | None, model: StreamedModel, device: torch.device
    ) -> list[Batch] | None:
        if path is None:
            return None
        options = self.options
        samples = read_samples(path)
        if options.samples is not None and len(samples) > options.samples:
            self.report.notes.append(
                f"{path.name}: the first {options.samples} of {len(samples)} samples are used"
            )
            samples = samples[: options.samples]
        batches = make_batches(
            samples,
            load_processor(self.tuned),
            batch_size=options.batch_size,
            max_length=options.max_length,
            dtype=run_dtype(model.model),
            config=model.model.config,
        )
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def _spill(self, plan: PatchPlan, out: Path, stack: ExitStack) -> ActivationSpill | None:
        if self.options.max_ram is None:
            return None
        spill = ActivationSpill(self.options.max_ram - plan.ram, out.absolute().parent)
        stack.callback(spill.close)
        return spill

    @staticmethod
    def _bytes(weights: StreamedWeights) -> int:
        return sum(weights.staged.layout.tensors[name].nbytes for name in weights.written)
