"""``stitch_checkpoints``: several fine-tunes of one base into one checkpoint, layer by layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast._core.machine import check_device_memory, check_memory
from tailor_fast._core.progress import Progress, Silent
from tailor_fast._core.transfer import Outbox
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.moments import Moments
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.statfile import Statistics, is_statistics, open_statistics
from tailor_fast.checkpoint import StagedCheckpoint, is_adapter, local_path, plan_layout
from tailor_fast.patching.picture import draw_report
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.sources import BLOCK_BYTES, LayerOnDisk, check_owner
from tailor_fast.stitching.joint import require_grams
from tailor_fast.stitching.outputs import describe
from tailor_fast.stitching.solving import LayerSolver
from tailor_fast.stitching.support import Support
from tailor_fast.stitching.tasks import (
    OLD,
    OpenTask,
    PathLike,
    Task,
    check_tasks,
    open_tasks,
    settled,
)

# Bytes per weight at the peak beside the words, fp32 copies and float64 products included, and
# matrices of the Gram's size: a task's own, the joint one, two more while scores are prepared.
_WEIGHT_BYTES = 84
_GRAMS = 4


def stitch_checkpoints(
    base: PathLike,
    tasks: Mapping[str, Task],
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    support: Support = "union",
    retain: PathLike | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write one model that does the tasks of several fine-tunes of ``base``.

    One patch is solved for all tasks at once: on its support it is the minimiser of the tasks'
    squared errors, each in units of its own inputs and times its weight (``stitching.joint``). Each
    layer is read from one checkpoint after the other, with one Gram at a time, so that memory does
    not grow with the number of tasks. ``out`` is absent, or its old self, until it is complete.

    Args:
        base: checkpoint before fine-tuning, common to all tasks.
        tasks: by name, as it will stand in the report.
        out: directory to make; files beside the weights are those of ``base``.
        recipe: density, score and the like; ``propagate`` is ``none``, and ``refits`` need scope
            ``tensor``. None takes the defaults.
        support: which weights may change: the ``union`` of what each task would keep by itself at
            ``density``, or the ``best`` of all tasks' scores, ``density`` of them in all. With
            refits, as many weights as that, chosen by the joint solve itself.
        retain: samples of old tasks, or what ``calibrate`` wrote for ``base`` on them: the patch is
            held to change little there, with weight ``recipe.retain_weight``.
        options: device, memory and the like. Where samples are given, their statistics are kept in
            a directory beside ``out`` for the time of the run.
        progress: told about each layer.

    Returns:
        The report that is also written to ``out``; its layers are ``StitchedLinear``.

    Raises:
        InputError: a file is missing, malformed, or does not fit the others.
        UsageError: the request contradicts itself.
        OutputError: ``out`` exists, is locked, or may not be written.
        StorageError: reading or writing failed half way.
    """
    check_tasks(tasks)
    options = options or RunOptions()
    options.refuse_max_vram("stitch")
    start = time.perf_counter()
    report = Report({})
    recipe = settled(recipe or Recipe(), support, report, retains=retain is not None)
    job = _Job(
        local_path(base),
        tasks,
        Path(out),
        recipe,
        support,
        None if retain is None else Path(retain),
        options,
        progress or Silent(),
    )
    report.recipe = job.asked()
    return job.run(report, start)


@dataclass(frozen=True)
class _Job:
    """One run."""

    base: Path
    tasks: Mapping[str, Task]
    out: Path
    recipe: Recipe
    support: Support
    retain: Path | None
    options: RunOptions
    progress: Progress

    def run(self, report: Report, start: float) -> Report:
        """Do it; ``report`` is filled in."""
        with ExitStack() as stack:
            tasks = stack.enter_context(open_tasks(self.base, self.tasks, self.recipe))
            report.notes += self._check_memory(tasks[0].sources.layers)
            staged = stack.enter_context(self._staged(tasks))
            files = stack.enter_context(self._statistics(report))
            for task in tasks:
                task.attach(stack.enter_context(open_statistics(files[task.name])))
            old = stack.enter_context(open_statistics(files[OLD])) if OLD in files else None
            self._check(tasks, old, report)
            with Writer(staged) as writer, torch.no_grad():
                written = self._solve(tasks, old, report, writer)
                self._copy_rest(tasks[0], staged, written)
                picture = draw_report(report.to_dict())
                with report.timed("write"):
                    writer.drain()
            report.seconds["total"] = time.perf_counter() - start
            describe(staged, self.base, tasks, report, picture)
            for checkpoint in (tasks[0].sources.base, *(task.file for task in tasks)):
                checkpoint.checkpoint.check_unchanged()
            staged.commit()
        self.progress.finish()
        return report

    def asked(self) -> dict[str, Any]:
        """What is done, for the report."""
        weights = {name: task.weight for name, task in self.tasks.items()}
        surrogates = [name for name, task in self.tasks.items() if task.patch is not None]
        chosen = {"support": self.support, "weights": weights, "surrogates": surrogates}
        return {**self.recipe.model_dump(), **chosen}

    @contextmanager
    def _statistics(self, report: Report) -> Iterator[dict[str, Path]]:
        """The statistics file of each task, and of old tasks; taken first where samples are given.

        They are removed at the end of the run.
        """
        given = {name: task.statistics for name, task in self.tasks.items()}
        found = {name: Path(path) for name, path in given.items() if path is not None}
        samples = {
            name: (task.source, task.calibration)
            for name, task in self.tasks.items()
            if task.calibration is not None
        }
        if self.retain is not None and is_statistics(self.retain):
            found[OLD] = self.retain
        elif self.retain is not None:
            samples[OLD] = self.base, self.retain
        if not samples:
            yield found
            return
        name, parent = f".{self.out.name}.stitch-", self.out.absolute().parent
        with tempfile.TemporaryDirectory(dir=parent, prefix=name) as folder:
            for index, (name, (model, data)) in enumerate(samples.items()):
                self.progress.note(f"{name}: taking statistics")
                found[name] = Path(folder) / f"{index}.safetensors"
                with report.timed("statistics"):
                    done = calibrate(
                        model,
                        data,
                        found[name],
                        base=self.base if is_adapter(model) else None,
                        options=replace(self.options, overwrite=False),
                        progress=self.progress,
                    )
                report.notes += [f"{name}: {note}" for note in done.notes]
            yield found

    def _staged(self, tasks: list[OpenTask]) -> StagedCheckpoint:
        first = tasks[0].sources.base.checkpoint
        layout = plan_layout(first.tensors.values(), max_shard_bytes=self.options.max_shard_bytes)
        inputs = [path for task in tasks for path in task.file.checkpoint.input_paths]
        return StagedCheckpoint(
            self.out,
            layout,
            overwrite=self.options.overwrite,
            inputs=(*first.input_paths, *inputs),
        )

    def _check_memory(self, layers: Sequence[LayerOnDisk]) -> list[str]:
        need = max(_layer_bytes(layer) for layer in layers)
        limit = self.options.max_ram
        if limit is not None and need > limit:
            raise UsageError(
                f"max_ram of {limit} bytes is too little: the largest layer and its statistics take"
                f" {need}; expected more, or fewer layers (`targets`)"
            )
        device = torch.device(self.options.device)
        if device.type == "cpu":
            return check_memory(need, limit)
        return check_memory(0, limit) + check_device_memory(need, device)

    def _check(self, tasks: list[OpenTask], old: Statistics | None, report: Report) -> None:
        """Refuse what does not belong together."""
        sources = tasks[0].sources
        report.notes += sources.notes
        self.progress.note("hashing the models")
        with report.timed("hash"):
            root = sources.base.root(bytearray(BLOCK_BYTES))
            for task in tasks:
                task.check(root)
            if old is not None:
                check_owner(old, sources.base, sources.layers, "BASE")
        names = [task.name for task in tasks if task.is_surrogate]
        if names:
            report.notes.append(
                f"surrogate for {', '.join(names)}: the patch stands for the whole difference of"
                " the fine-tuned model"
            )

    def _solve(
        self, tasks: list[OpenTask], old: Statistics | None, report: Report, writer: Writer
    ) -> set[str]:
        """Solve and write every layer that any task changes; returns the tensors written."""
        device = torch.device(self.options.device)
        sources = tasks[0].sources
        layers = [
            layer for layer in sources.layers if any(task.changes(layer.tensor) for task in tasks)
        ]
        report.note_equal(len(sources.layers) - len(layers), len(sources.layers))
        retained = None if old is None else partial(_moments_of, old)
        solver = LayerSolver(self.recipe, self.support, tasks, retained, device)
        written, nbytes, outbox = set(), 0, Outbox()
        self.progress.start(len(layers))
        for done, layer in enumerate(layers, 1):
            with report.timed("solve"):
                weight, row = solver.solve(layer)
            row.tensor = layer.tensor
            report.linears.append(row)
            if weight is not None:
                stored = weight.T.contiguous() if layer.target.transposed else weight
                writer.put(layer.tensor, *outbox.send(stored))
                written.add(layer.tensor)
                nbytes += sources.base.checkpoint.tensors[layer.tensor].nbytes
            self.progress.group(layer.target.name, done, len(layers), nbytes)
        return written

    def _copy_rest(self, task: OpenTask, staged: StagedCheckpoint, written: set[str]) -> None:
        """Copy what is not patched from the base."""
        buffer, base = bytearray(BLOCK_BYTES), task.sources.base
        for shard in staged.layout.shards:
            for name in shard.tensors:
                if name not in written:
                    for begin, view in base.blocks(name, buffer):
                        staged.write(name, begin, view)


def _moments_of(statistics: Statistics, name: str, device: torch.device) -> Moments | None:
    """Moments of a layer's inputs on old tasks."""
    if name not in statistics:
        raise InputError(
            f"the statistics of old tasks have no entry for {name}; expected one for every layer"
            " that is patched; calibrate again on data that runs through it"
        )
    found = statistics.moments(name, device)
    return None if found is None else require_grams("old tasks", found)


def _layer_bytes(layer: LayerOnDisk) -> int:
    """Working set of one layer in bytes."""
    rows, cols = layer.shape
    return rows * cols * _WEIGHT_BYTES + cols * cols * 4 * _GRAMS
