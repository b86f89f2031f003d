"""The tasks that are stitched: what the caller gives, and what a run reads of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.moments import Moments
from tailor_fast.calibration.statfile import Statistics
from tailor_fast.checkpoint import Hashed, local_path, open_checkpoint
from tailor_fast.ops.codec import EncodedPatch, apply_patch_
from tailor_fast.patchfile import Patch, WrongStateError
from tailor_fast.patching.inputs import with_refits
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.recipe import DEFAULT_RETAIN, Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.sources import LayerOnDisk, Sources, check_owner, open_sources
from tailor_fast.patching.streamed import read_pair
from tailor_fast.stitching.joint import require_grams
from tailor_fast.stitching.support import Support

PathLike = str | os.PathLike[str]
OLD = "old tasks"  # in place of a task's name


@dataclass(frozen=True)
class Task:
    """One fine-tune of the base, and data of its task.

    Attributes:
        tuned: checkpoint after fine-tuning: a directory, a file, or a hub name in the local cache.
        patch: a patch file of the base in its place: the *surrogate*, which takes the patch for the
            whole difference (``D := P``), for when the fine-tuned checkpoint is not at hand.
        statistics: what ``calibrate`` wrote for the fine-tuned model.
        calibration: samples of the task in place of statistics, which are then taken first.
        weight: how much the task counts against the others, above 0.
    """

    tuned: PathLike | None = None
    patch: PathLike | None = None
    statistics: PathLike | None = None
    calibration: PathLike | None = None
    weight: float = 1.0

    @property
    def source(self) -> Path:
        """The checkpoint, or the patch file."""
        if self.tuned is not None:
            return local_path(self.tuned)
        if self.patch is None:
            raise RuntimeError("a task without a model")
        return Path(self.patch)


def check_tasks(tasks: Mapping[str, Task]) -> None:
    """Check what can be said without opening a file.

    Raises:
        UsageError: no task, or one that gives too little, too much, or a weight that is none.
    """
    if not tasks:
        raise UsageError("no task is given; expected at least one")
    for name, task in tasks.items():
        if name in ("", "base", OLD) or any(ord(letter) < 32 for letter in name):
            raise UsageError(f"a task cannot be called {name!r}; choose another name")
        if (task.tuned is None) == (task.patch is None):
            raise UsageError(f"task {name!r}: expected a tuned checkpoint or a patch, one of them")
        if (task.statistics is None) == (task.calibration is None):
            raise UsageError(f"task {name!r}: expected statistics or samples, one of them")
        if task.patch is not None and task.calibration is not None:
            raise UsageError(
                f"task {name!r}: samples must run through the fine-tuned model, and only its patch"
                " is given; expected statistics that were taken on it"
            )
        if not (math.isfinite(task.weight) and task.weight > 0):
            raise UsageError(
                f"task {name!r}: weight must be a finite number above 0; got {task.weight}"
            )


class OpenTask:
    """A task's model and statistics, open.

    Attributes:
        name: what the caller calls it.
        weight: how much it counts.
        sources: the base beside the task's checkpoint, or beside itself for a surrogate.
        file: the checkpoint, or the patch file, itself.
    """

    def __init__(
        self, name: str, weight: float, sources: Sources, patch: Patch | None, file: Hashed
    ) -> None:
        self.name = name
        self.weight = weight
        self.sources = sources
        self.file = file
        self._patch = patch
        self._sums: Statistics | None = None
        self._groups: dict[str, tuple[str, ...]] = {}

    @property
    def statistics(self) -> Statistics:
        """Sums over the inputs of the task's model."""
        if self._sums is None:
            raise RuntimeError(f"task {self.name!r} has no statistics yet")
        return self._sums

    def attach(self, statistics: Statistics) -> None:
        """Take the statistics, which are there later than the model where samples are given."""
        self._sums = statistics
        self._groups = {name: group for group in statistics.header.groups for name in group}

    @property
    def is_surrogate(self) -> bool:
        """Whether a patch stands for the fine-tuned model."""
        return self._patch is not None

    def changes(self, tensor: str) -> bool:
        """Whether the task's tensor differs from the base's."""
        if self._patch is not None:
            return tensor in self._patch
        return not self.sources.equal(tensor)

    def check(self, base_root: str) -> None:
        """Check that all of it belongs together; reads every weight once.

        Raises:
            InputError: the statistics are of another model, or the patch is of another base.
        """
        if self._patch is None:
            sources, role = self.sources, f"task {self.name!r}"
            check_owner(self.statistics, sources.tuned, sources.layers, role)
            return
        plan = self._patch.plan
        if plan.digest == "xxh3-128" and plan.base_root != base_root:
            raise WrongStateError(
                f"is a patch of another base (digest {plan.base_root}) than BASE ({base_root})",
                path=self._patch.path,
                remedy="give the base that the patch was made from",
            )
        if self.statistics.header.model_root == base_root:
            raise InputError(
                f"task {self.name!r}: its statistics are of BASE; expected those of the fine-tuned"
                " model that the patch was made from; calibrate that"
            )

    def pair(self, layer: LayerOnDisk, device: torch.device) -> LayerPair:
        """Read a layer of the base and of the task's model; weights become ``[rows, cols]``."""
        pair = read_pair(self.sources, layer, device)
        if self._patch is None:
            return pair
        stored = pair.base.T if layer.target.transposed else pair.base
        patched = self._patched(layer.tensor, stored)
        tuned = patched.T.contiguous() if layer.target.transposed else patched
        bias = pair.base_bias
        if bias is not None and layer.bias is not None:
            bias = self._patched(layer.bias, bias)
        return LayerPair(pair.base, tuned, pair.base_bias, bias)

    def _patched(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A copy of the base's words with the patch on it."""
        words = stored.clone(memory_format=torch.contiguous_format)
        if self._patch is not None and name in self._patch:
            encoded = self._patch.encoded(name)
            apply_patch_(words, EncodedPatch(*(part.to(words.device) for part in encoded)))
        return words

    def group_of(self, name: str) -> tuple[str, ...]:
        """The layers that share their input with the layer called ``name``, itself among them."""
        return self._groups[name]

    def moments(self, name: str, device: torch.device) -> Moments | None:
        """Moments of a layer's inputs; None where no token of the task reaches it.

        Raises:
            InputError: the statistics are of kind ``diag``.
        """
        if name not in self.statistics:
            return None
        found = self.statistics.moments(name, device)
        if found is None or not bool(found.diag.any()):
            return None
        return require_grams(f"task {self.name!r}", found)


@contextmanager
def open_tasks(base: Path, tasks: Mapping[str, Task], recipe: Recipe) -> Iterator[list[OpenTask]]:
    """Open every task's model; reads headers only.

    Args:
        base: checkpoint before fine-tuning.
        tasks: as ``check_tasks`` accepts them.
        recipe: which layers are wanted.

    Raises:
        InputError: a file is malformed or does not match the base.
        UsageError: the recipe's patterns leave no layer.
    """
    with ExitStack() as stack:
        opened = []
        for name, task in tasks.items():
            theirs = base if task.patch is not None else task.source
            sources = stack.enter_context(open_sources(base, theirs, recipe, runs_model=False))
            patch, file = None, sources.tuned
            if task.patch is not None:
                patch = stack.enter_context(Patch.open(task.patch))
                file = Hashed(stack.enter_context(open_checkpoint(task.patch)))
            opened.append(OpenTask(name, task.weight, sources, patch, file))
        yield opened


def settled(recipe: Recipe, support: Support, report: Report, *, retains: bool) -> Recipe:
    """Return the recipe as it will be run: from statistics, all tasks jointly.

    Args:
        recipe: what was asked for.
        support: what was asked for.
        report: told how the mask is chosen.
        retains: whether there is data of old tasks.

    Raises:
        UsageError: it asks for what stitching does not do.
    """
    chosen = recipe.model_fields_set
    fixed: dict[str, str | None] = {"decorate": "exact", "propagate": "none", "untouched": "base"}
    fixed |= {"missing": None, "densities": None}
    for name, value in fixed.items():
        if name in chosen and getattr(recipe, name) != value:
            raise UsageError(
                f"{name} {getattr(recipe, name)!r} is for one task; stitching solves all tasks"
                f" jointly from statistics; expected {value!r}; leave it out"
            )
    if support not in ("union", "best"):
        raise UsageError(f"support must be 'union' or 'best'; got {support!r}")
    scopes = ("tensor",) if support == "best" else ("tensor", "block", "row")
    if recipe.scope not in scopes:
        raise UsageError(
            f"scope {recipe.scope!r} cannot be used with support {support!r}; expected"
            f" {' or '.join(scopes)}"
        )
    if recipe.sensitivity == "ratio" and not retains:
        raise UsageError(
            "sensitivity 'ratio' compares with old tasks; got no old-task data; give retain data"
        )
    if recipe.refits and recipe.scope != "tensor":
        raise UsageError(
            f"refits choose the mask of a whole layer for all tasks; got scope {recipe.scope!r};"
            " expected 'tensor', or no refits"
        )
    recipe = with_refits(recipe, report, old=retains and recipe.scope == "tensor")
    changes: dict[str, Any] = {"propagate": "none"}
    if recipe.retain_weight is None:
        changes["retain_weight"] = DEFAULT_RETAIN
    return recipe.model_copy(update=changes)
