"""What a pass over a model holds in memory, known without weights, and what a limit leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.machine import hold_to
from tailor_fast.calibration.moments import CHUNK_TOKENS
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import Kind
from tailor_fast.calibration.streamed import run_dtype
from tailor_fast.calibration.token_buffer import TOKENS_AT_ONCE
from tailor_fast.calibration.tracing import Lane, trace_lanes
from tailor_fast.models import Residency, find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FP32 = 4
_UNBOUNDED = 1 << 62
_NO_LANE = Lane(0, 0, 0)


def passing_bytes(
    lane: Lane, cols: int, word: int, waiting: int = TOKENS_AT_ONCE, paired: int | None = None
) -> int:
    """Bytes of passes on their way to a layer, or of what is made of their inputs there.

    Args:
        lane: of one pass.
        cols: of the layer's input.
        word: bytes of one of its words.
        waiting: tokens that are put aside until there are enough of them.
        paired: tokens of all samples where two streams are compared; None for one stream.
    """
    sides = 1 if paired is None else 2
    counted = (lane.tokens + waiting) * cols * word * sides  # the first without padding: a copy
    chunk = 0
    if paired is not None:
        tokens = min(paired, max(TOKENS_AT_ONCE, min(lane.tokens, CHUNK_TOKENS)))
        chunk = tokens * cols * _FP32
    running = lane.run + (sides - 1) * lane.stand
    return max(running, sides * lane.stand + counted + chunk)


def input_columns(model: PreTrainedModel) -> dict[str, int]:
    """Columns of the input of every layer that can be patched, by its name."""
    return {
        target.name: int(
            model.get_submodule(target.name).weight.shape[0 if target.transposed else 1]  # type: ignore[index]  # untyped attribute
        )
        for target in find_targets(model)
    }


@dataclass(frozen=True)
class PassPlan:
    """Memory of a pass that takes statistics, where the model runs; sizes in bytes.

    Attributes:
        bytes: taken at most: weights, inputs, sums, and one pass on its way.
        layer: where that is.
        weights: most that are resident.
        note: why activations are not in it, else empty.
    """

    bytes: int
    layer: str
    weights: int
    note: str = ""


class PassPlanner:
    """Plans the pass of ``calibrate``.

    Args:
        model: without its weights.
        batches: that run through it.
        kind: of the statistics.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], kind: Kind
    ) -> None:
        self._cols = input_columns(model)
        self._full = kind == "full"
        self._word = run_dtype(model).itemsize
        tensors = (t for b in batches for t in b.values() if isinstance(t, torch.Tensor))
        self._inputs = sum(tensor.nbytes for tensor in tensors)
        self._lanes, self._why = trace_lanes(model, batches, self._cols)
        resident = Residency.most_resident(model, self._cols)
        self._weights = {name: words * self._word for name, words in resident.items()}

    def plan(self, repeated: Iterable[str] = ()) -> PassPlan:
        """Plan the pass.

        Args:
            repeated: layers that are called several times in a pass, whose sums are taken together.
        """
        weights = max(self._weights.values(), default=0)
        sizes = dict(self._sizes(frozenset(repeated), weights))
        layer = max(sizes, key=sizes.__getitem__, default="")
        note = f"activations are not in the plan: {self._why}" if self._why else ""
        most = sizes.get(layer, weights + self._inputs)
        return PassPlan(most, layer, weights, note)

    def _sizes(self, repeated: frozenset[str], weights: int) -> Iterator[tuple[str, int]]:
        waiting, together, passing = TOKENS_AT_ONCE if self._full else 0, 0, 0
        for name, cols in self._cols.items():
            lane = self._lanes.get(name, _NO_LANE)
            sums = cols * (cols if self._full else 1) * _FP32
            if name in repeated:
                together += sums + waiting * cols * self._word
                passing = max(passing, passing_bytes(lane, cols, self._word, 0))
            else:
                taken = sums + passing_bytes(lane, cols, self._word, waiting)
                yield name, self._weights[name] + self._inputs + taken
        if repeated:
            passing = max(passing, *(lane.run for lane in self._lanes.values()), 0)
            name = f"{min(repeated)} and others that are called several times in a pass"
            yield name, weights + self._inputs + together + passing


class Room:
    """What ``calibrate`` may take where the model runs, and in the machine's memory.

    Args:
        model: without its weights.
        batches: that run through it.
        kind: of the statistics.
        options: of the run.
        reading: what reading a tensor takes beside it, in the machine's memory.

    Attributes:
        plan: of the pass; None where nothing bounds it.

    Raises:
        UsageError: the pass takes more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Mapping[str, Any]],
        kind: Kind,
        options: RunOptions,
        reading: int,
    ) -> None:
        device = torch.device(options.device)
        self._on_host = device.type == "cpu"
        self._most = options.max_ram
        self._limit = hold_to(options.max_vram, device)
        self._reading = reading
        self._planner: PassPlanner | None = None
        self.plan: PassPlan | None = None
        if self._limit is not None or self._most is not None:
            self._planner = PassPlanner(model, batches, kind)
            self.plan = self._fitting(self._planner.plan())

    @property
    def note(self) -> str:
        """What the plan leaves out, else empty."""
        return "" if self.plan is None else self.plan.note

    def add_repeated(self, names: Sequence[str]) -> None:
        """Count layers that are called several times in a pass, once they are known.

        Raises:
            UsageError: the pass takes more than it may.
        """
        if self._planner is not None and names:
            self.plan = self._fitting(self._planner.plan(names))

    def spill(self, stack: ExitStack, out: Path) -> ActivationSpill | None:
        """Where passes wait until ``stack`` ends; None where nothing bounds them.

        Args:
            stack: closes it.
            out: the output, beside which a file is made.
        """
        if self.plan is None:
            return None
        left = None if self._limit is None else self._limit - self.plan.bytes
        budget = _UNBOUNDED if self._most is None else self._most - self._host_bytes(self.plan)
        spill = ActivationSpill(budget, out.absolute().parent, left)
        stack.callback(spill.close)
        return spill

    def _host_bytes(self, plan: PassPlan) -> int:
        """Weights alone pass through the machine's memory on their way to a GPU."""
        return self._reading + (plan.bytes if self._on_host else plan.weights)

    def _fitting(self, plan: PassPlan) -> PassPlan:
        limits = {"max_vram": self._limit, "max_ram": self._most}
        for name, taken in {"max_vram": plan.bytes, "max_ram": self._host_bytes(plan)}.items():
            limit = limits[name]
            if limit is not None and taken > limit:
                raise UsageError(
                    f"{name} of {limit} bytes is too little: statistics of {plan.layer} take"
                    f" {taken}; expected at least that, or a smaller batch_size"
                )
        return plan
