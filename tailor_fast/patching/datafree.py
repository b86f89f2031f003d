"""Patching without data, from disk to disk: every input byte is read once where the scope allows.

Tensors are taken in the order of the output files. A layer that fits into the ring is solved whole;
one that does not is read twice, some rows at a time: for its threshold, then for its mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby

import torch

from tailor_fast._core.transfer import own_stream, page_locked
from tailor_fast.checkpoint import StagedCheckpoint
from tailor_fast.ops.select import TopKSelector
from tailor_fast.patching.masks import mask_within
from tailor_fast.patching.memory import SOLVERS, Memory, copy_parts, is_cut, parts_of
from tailor_fast.patching.pipeline import Loaded, Part, Pipeline, Worker, Writer
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport, Report
from tailor_fast.patching.resuming import Ledger
from tailor_fast.patching.ring import Ring
from tailor_fast.patching.solving import keep_
from tailor_fast.patching.sources import LayerOnDisk, Sources

Told = Callable[[str, int, int, int], None]  # (layer, layers done, layers in all, bytes done)
COPY_RING_BYTES = 64 << 20


class DataFree:
    """Selects by salience alone, decorates nothing, and writes every tensor of the output.

    Args:
        sources: the open pair.
        recipe: as resolved: salience weight 1, nothing decorated.
        units: unit of each layer for the scopes ``layer`` and ``global``; empty for the others.
        report: filled in.
        memory: how large the ring is.
        device: where layers are solved.
        ledger: what an earlier run finished, and this one.
    """

    def __init__(
        self,
        sources: Sources,
        recipe: Recipe,
        units: Mapping[str, str],
        report: Report,
        memory: Memory,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self._sources = sources
        self._recipe = recipe
        self._report = report
        self._memory = memory
        self._device = device
        self._layers = {layer.tensor: layer for layer in sources.layers}
        self._cut = {
            layer.tensor for layer in sources.layers if is_cut(sources, layer, memory.ring)
        }
        self._units = dict(units)
        if recipe.scope == "tensor":
            layers = (self._layers[tensor] for tensor in self._cut)
            self._units = {la.target.name: la.tensor for la in layers if la.slices == 1}
        self._equal: dict[str, bool] = {}  # by tensor, as far as it is known
        self._selectors: dict[str, TopKSelector] = {}
        self._earlier = ledger.earlier
        self._rows = ledger.rows  # by tensor

    def run(self, staged: StagedCheckpoint, writer: Writer, told: Told) -> None:
        """Write every tensor; the last of them may be on their way to disk at the end.

        Args:
            staged: the output.
            writer: writes to it.
            told: called after each layer.
        """
        ring = Ring(self._memory.ring)
        with (
            page_locked(ring.memory, self._device),
            Pipeline(self._sources.base, self._sources.tuned, writer, ring) as pipeline,
        ):
            with self._report.timed("scores"):
                self._find_thresholds(pipeline)
            names = [name for shard in staged.layout.shards for name in shard.tensors]
            names = [name for name in names if name not in self._earlier]
            done, passed = len(self._earlier & self._layers.keys()), 0
            with self._report.timed("stream"), _solvers() as solvers:
                for loaded in pipeline.stream(self._parts(names)):
                    part, layer = loaded.part, self._layers.get(loaded.part.name)
                    patching = None
                    if layer is not None and not self._equal.get(layer.tensor):
                        patching = solvers.submit(partial(self._patch, layer, loaded))
                        if layer.target.name in self._units:
                            patching.result()  # a selector takes rows in order, from one thread
                    pipeline.write(loaded, part.sides[0], patching)
                    if layer is not None and part.end == self._size(layer.tensor):
                        done, passed = done + 1, passed + part.end
                        told(layer.target.name, done, len(self._layers), passed)
                solvers.finish()
        self._fill_report()

    def _find_thresholds(self, pipeline: Pipeline) -> None:
        """Settle what must be known before a first part is written: equality and thresholds."""
        for layer in self._sources.layers:
            if layer.target.name in self._units or layer.tensor in self._cut:
                self._equal[layer.tensor] = self._sources.equal(layer.tensor)
        units: dict[str, list[str]] = {}  # names of their tensors
        for layer in self._sources.layers:
            if layer.target.name in self._units and not self._equal[layer.tensor]:
                units.setdefault(self._units[layer.target.name], []).append(layer.tensor)
        waiting = [unit for unit, names in units.items() if not self._earlier.issuperset(names)]
        while waiting:
            names = [name for unit in waiting for name in units[unit]]
            waiting = []
            # One unit after the other: keys of one alone are held.
            for unit, stretch in groupby(pipeline.stream(self._parts(names)), self._unit_of):
                if not self._observe(unit, stretch, pipeline):
                    waiting.append(unit)

    def _unit_of(self, loaded: Loaded) -> str:
        return self._units[self._layers[loaded.part.name].target.name]

    def _observe(self, unit: str, stretch: Iterable[Loaded], pipeline: Pipeline) -> bool:
        """Show all of a unit to its selector; False: it must be shown once more."""
        if unit not in self._selectors:
            self._selectors[unit] = self._selector(unit)
        selector = self._selectors[unit]
        for loaded in stretch:
            layer = self._layers[loaded.part.name]
            first, rows = self._first_row(layer, loaded), layer.shape[0]
            base, tuned = self._matrices(layer, loaded)
            selector.observe(layer.target.name, base, tuned, first_row=first, rows=rows)
            pipeline.drop(loaded)
        return selector.finish()

    def _selector(self, unit: str) -> TopKSelector:
        recipe = self._recipe
        if recipe.scope == "tensor":  # the unit is one tensor
            recipe = recipe.of(self._layers[unit].target.name)
        # Within one tensor the order of one term does not depend on the tensor's mean and std.
        plain = recipe.scope == "tensor" and recipe.normalize == "tensor"
        return TopKSelector(
            recipe.density,
            salience_weight=1.0,
            normalize="none" if plain else recipe.normalize,
            memory=self._memory.keys,
        )

    def _parts(self, names: Iterable[str]) -> Iterator[Part]:
        for name in names:
            layer = self._layers.get(name)
            if layer is None or self._equal.get(name):
                yield from copy_parts(self._sources, name)
            else:
                yield from parts_of(self._sources, layer, self._memory.ring)

    def _patch(self, layer: LayerOnDisk, loaded: Loaded) -> None:
        """Turn the base's words in memory into the output's."""
        start = time.perf_counter()
        if layer.tensor not in self._equal and self._is_equal(layer, loaded):
            self._equal[layer.tensor] = True
            return
        name, (rows, cols) = layer.target.name, layer.shape
        # What a selector keeps on the device passes from thread to thread: one stream for all.
        beside = nullcontext() if name in self._units else own_stream(self._device)
        with beside:
            kept = self._keep(layer, loaded)
        row = self._rows.setdefault(
            layer.tensor, LinearReport(name, rows, cols, kept=0, tensor=layer.tensor, group=(name,))
        )
        row.kept += kept
        row.seconds += time.perf_counter() - start

    def _keep(self, layer: LayerOnDisk, loaded: Loaded) -> int:
        """Write the kept words over the base's; returns how many they are."""
        base, tuned = self._matrices(layer, loaded)
        mask = self._mask(layer, loaded, base, tuned)
        keep_(base, tuned, mask)
        stored = self._stored(layer, loaded)[0]
        if base.data_ptr() != stored.data_ptr():
            stored.copy_(base.T if layer.target.transposed else base)
        return int(mask.count_nonzero())

    def _mask(
        self, layer: LayerOnDisk, loaded: Loaded, base: torch.Tensor, tuned: torch.Tensor
    ) -> torch.Tensor:
        name = layer.target.name
        recipe = self._recipe.of(name)
        first, rows = self._first_row(layer, loaded), layer.shape[0]
        if name in self._units:
            selector = self._selectors[self._units[name]]
            return selector.mask(name, base, tuned, first_row=first, rows=rows)
        part = name if len(base) == rows else f"{name}[{first}:{first + len(base)}]"
        return mask_within(recipe, base, tuned, None, part)

    def _is_equal(self, layer: LayerOnDisk, loaded: Loaded) -> bool:
        ours, theirs = self._sources.base.digests, self._sources.tuned.digests
        if ours[layer.tensor] != theirs[layer.tensor]:
            return False
        words = (torch.frombuffer(loaded.view(side), dtype=torch.uint8) for side in loaded.spans)
        return torch.equal(*words)

    def _matrices(self, layer: LayerOnDisk, loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, cols]`` of base and tuned on the device; where they lie, if that is possible."""
        base, tuned = (stored.to(self._device) for stored in self._stored(layer, loaded))
        if layer.target.transposed:
            return base.T.contiguous(), tuned.T.contiguous()
        return base, tuned

    def _stored(self, layer: LayerOnDisk, loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
        info = self._sources.tuned.checkpoint.tensors[layer.tensor]
        return loaded.words("base", info), loaded.words("tuned", info)

    def _first_row(self, layer: LayerOnDisk, loaded: Loaded) -> int:
        return loaded.part.begin // (self._size(layer.tensor) // layer.shape[0])

    def _size(self, name: str) -> int:
        return self._sources.tuned.checkpoint.tensors[name].nbytes

    def _fill_report(self) -> None:
        order = [layer.tensor for layer in self._sources.layers]
        self._report.linears += [self._rows[name] for name in order if name in self._rows]
        self._report.note_equal(len(order) - len(self._report.linears), len(order))


@contextmanager
def _solvers() -> Iterator[Worker]:
    """Threads that solve layers side by side, and share the cores.

    Two small pieces of work next to each other lose less time than the halves of one: reading and
    writing take turns with them on the same cores.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // SOLVERS))
    try:
        with Worker("solve", min(SOLVERS, cores)) as solvers:
            yield solvers
    finally:
        torch.set_num_threads(cores)


def copy_rest(sources: Sources, writer: Writer, names: Iterable[str]) -> None:
    """Copy tensors that were not patched, and hash those inputs that were not read."""
    ring = Ring(COPY_RING_BYTES)
    with Pipeline(sources.base, sources.tuned, writer, ring) as pipeline:
        parts = (part for name in names for part in copy_parts(sources, name))
        for loaded in pipeline.stream(parts):
            pipeline.write(loaded, loaded.part.sides[0])
        writer.drain()
