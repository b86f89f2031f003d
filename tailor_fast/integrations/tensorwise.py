"""Patching one tensor at a time, as programs do that merge models tensor by tensor.

Statistics stand in for the model's inputs, so that every layer can be solved by itself; the words
are those that ``patch_checkpoint`` writes with the same recipe and statistics.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tailor_fast._core.closing import Closing
from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.calibration.statfile import Statistics, open_statistics
from tailor_fast.patching import Recipe, Report
from tailor_fast.patching.inputs import Given, resolve
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.scores import column_weight
from tailor_fast.patching.solving import GroupInputs, solve_layer
from tailor_fast.patching.sources import BLOCK_BYTES, LayerOnDisk, open_sources


class TensorwisePatch(Closing):
    """Patches the tensors of one pair of checkpoints, in any order, from any thread.

    Attributes:
        report: the layers that were patched so far.
    """

    def __init__(
        self,
        base: Path,
        tuned: Path,
        recipe: Recipe,
        *,
        statistics: Path | None = None,
        retain: Path | None = None,
    ) -> None:
        """Open both checkpoints and check that everything fits.

        Args:
            base: directory of the checkpoint before fine-tuning.
            tuned: the same after it.
            recipe: every choice of the method; ``scope`` must be within a tensor.
            statistics: what ``calibrate`` wrote for ``tuned`` on the new task; None selects by
                salience alone and decorates nothing.
            retain: what ``calibrate`` wrote for ``base`` on old tasks.

        Raises:
            InputError: a file is malformed, statistics are of another model or lack a layer.
            UsageError: the recipe asks for more than one tensor at a time can give.
        """
        if recipe.scope in ("layer", "global"):
            raise UsageError(
                f"scope {recipe.scope!r} compares tensors with each other; got them one at a time;"
                " expected scope 'tensor', 'row' or 'block'; use `tailor-fast patch` instead"
            )
        self._stack = ExitStack()
        try:
            self._sources = self._stack.enter_context(
                open_sources(base, tuned, recipe, runs_model=False)
            )
            self._layers = {layer.tensor: layer for layer in self._sources.layers}
            self._new = self._opened(statistics)
            self._old = self._opened(retain)
            kinds = [None if s is None else s.header.kind for s in (self._new, self._old)]
            self.report = Report(recipe.model_dump())
            given = Given(statistics=kinds[0], old_statistics=kinds[1])
            self._recipe = resolve(recipe, given, self.report)
            self._check(self._new, statistics, "tuned")
            self._check(self._old, retain, "base")
        except BaseException:
            self.close()
            raise
        self._lock = threading.Lock()
        self._last: GroupInputs | None = None  # layers of a group mostly come one after another

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def patch(
        self,
        name: str,
        base: torch.Tensor,
        tuned: torch.Tensor,
        *,
        density: float | None = None,
    ) -> torch.Tensor:
        """Return the patched tensor.

        Args:
            name: of the tensor in the checkpoints.
            base: its values in the base checkpoint, of any float dtype.
            tuned: the same in the tuned one, like ``base``.
            density: for this tensor, instead of the recipe's.

        Raises:
            InputError: the checkpoints have no such tensor, or it cannot be solved.
        """
        if name not in self._sources.base.checkpoint.tensors:
            raise InputError(
                f"{self._sources.base.checkpoint.path}: has no tensor {name!r}; expected the names"
                " of the file; use `tailor-fast patch` for this pair"
            )
        layer = self._layers.get(name)
        if layer is None:
            return tuned if self._recipe.untouched == "tuned" else base
        if torch.equal(base, tuned):
            return base
        recipe = self._recipe.of(layer.target.name)
        if density is not None:
            recipe = recipe.model_copy(update={"density": density})
        turned = layer.target.transposed
        pair = LayerPair(
            (base.T if turned else base).contiguous(),
            (tuned.T if turned else tuned).contiguous(),
            *self._biases(layer, base.device),
        )
        inputs = self._inputs(layer.target.name, base.device)
        weight, row = solve_layer(layer.target, pair, inputs, Masks(recipe, {}), recipe)
        row.tensor = name
        with self._lock:
            self.report.linears.append(row)
        return weight.T.contiguous() if turned else weight

    def _opened(self, path: Path | None) -> Statistics | None:
        return None if path is None else self._stack.enter_context(open_statistics(path))

    def _check(self, statistics: Statistics | None, path: Path | None, role: str) -> None:
        """The statistics must be of this very model, with an entry for every changed layer."""
        if statistics is None:
            return
        source = self._sources.tuned if role == "tuned" else self._sources.base
        statistics.check_model(source.root(bytearray(BLOCK_BYTES)), role.upper())
        for layer in self._layers.values():
            name = layer.target.name
            if name not in statistics and not self._sources.equal(layer.tensor):
                raise InputError(
                    f"{path}: has no entry for {name}; expected one for every layer that is"
                    " patched; calibrate again on data that runs through it, or leave the layer"
                    " out with `ignore`"
                )

    def _biases(
        self, layer: LayerOnDisk, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if layer.bias is None:
            return None, None
        sources = (self._sources.base, self._sources.tuned)
        ours, theirs = (source.checkpoint.read(layer.bias).to(device) for source in sources)
        return ours, theirs

    def _inputs(self, name: str, device: torch.device) -> GroupInputs:
        """What is known of the inputs of the group that the layer ``name`` belongs to."""
        if self._new is None:
            return GroupInputs((name,), None, None, None)
        with self._lock:
            last = self._last
            here = last is not None and last.new is not None and last.new.diag.device == device
            if last is None or name not in last.members or not here:
                last = self._last = self._read(name, device)
        return last

    def _read(self, name: str, device: torch.device) -> GroupInputs:
        members = next(group for group in self._statistics.header.groups if name in group)
        new = self._statistics.moments(name, device)
        if new is None:
            raise InputError(
                f"no counted token of the statistics reaches {name}; expected some for every layer"
                " that is patched; calibrate again, or leave the layer out with `ignore`"
            )
        old: Moments | DiagonalMoments | None = None
        if self._old is not None:
            old = self._old.moments(name, device)
        recipe, weight = self._recipe, None
        if recipe.salience_weight != 1.0 and recipe.decorate != "official":
            weight = column_weight(recipe.sensitivity, new, old, recipe.percdamp, members[0])
        return GroupInputs(members, new, old, weight)

    @property
    def _statistics(self) -> Statistics:
        if self._new is None:
            raise RuntimeError("no statistics are open")
        return self._new


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from the values of a configuration; None stands for a value that is not given.

    Args:
        values: by name of the recipe's field.
        where: what the values come from, for messages.

    Raises:
        UsageError: a value is none that the recipe takes, or two contradict each other.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return Recipe(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        got = f"; got {first['input']!r}" if first["loc"] else ""
        raise UsageError(f"{where}: {field}{problem}{got}") from None
