"""``calibrate``: a model's statistics on data, to a file, for any number of recipes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.machine import check_memory, naming, release_free_memory
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.collect import Collector
from tailor_fast.calibration.data import Data, read_data
from tailor_fast.calibration.device import Room, input_columns
from tailor_fast.calibration.groups import Groups, discover
from tailor_fast.calibration.lockstep import Lockstep, Site, Stream
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import Kind, StatisticsHeader, write_group
from tailor_fast.calibration.streamed import StreamedModel, attach, skeleton_of
from tailor_fast.checkpoint import (
    Hashed,
    StagedFile,
    TensorSource,
    is_adapter,
    local_path,
    open_checkpoint,
    open_tuned,
)
from tailor_fast.models import caller, find_targets, map_keys, names_as_stored, refuse_fused
from tailor_fast.models.inputs import Tokens

_BUFFER_BYTES = 8 << 20
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` wrote.

    Attributes:
        groups: input groups in the file.
        layers: layers in all groups.
        uncalled: layers that no sample runs through; they are not in the file.
        samples: samples run.
        tokens: counted tokens of the group that saw most.
        bytes: size of the file.
        seconds: wall time.
        notes: what was decided, a sentence each.
        processes: that did it together.
        planned: bytes that weights, sums and a pass were to take where the model ran; None where
            nothing bounds it.
    """

    groups: int
    layers: int
    uncalled: tuple[str, ...]
    samples: int
    tokens: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    processes: int = 1
    planned: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def calibrate(
    model: PathLike,
    data: PathLike,
    out: PathLike,
    *,
    kind: Kind = "full",
    base: PathLike | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> CalibrationReport:
    """Run samples through a model and write the second moments of its layers' inputs.

    One block of the model and the sums of one input group are in memory at a time. Passes that wait
    have what ``options.max_vram`` leaves beside them; beyond it they go to the machine's memory,
    and beyond ``options.max_ram`` to disk.

    Args:
        model: checkpoint directory; or that of a LoRA adapter, which runs merged into ``base``.
        data: samples, JSON lines.
        out: file to make, named ``*.safetensors``.
        kind: ``full`` keeps the Gram of each group's inputs, ``diag`` its diagonal alone.
        base: the model that an adapter was trained on; None for any other ``model``.
        options: device, memory, which tokens count and the like.
        progress: told about each group.
        processes: what ``join_processes`` yields, to do it together with others: all give the same
            arguments (``options.device`` may differ), process 0 writes.

    Raises:
        InputError: model, processor or data are not usable.
        OutputError: ``out`` exists, is locked, or may not be written.
        PeerError: another process failed.
        StorageError: reading or writing failed half way.
        UsageError: ``out`` has another ending; ``options.max_ram`` is more than the machine has;
            it, ``options.max_vram`` or the GPU is too small for the largest group; an adapter
            without its base, or a base without one.
    """
    start, options, progress = time.perf_counter(), options or RunOptions(), progress or Silent()
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"{out}: expected a name that ends in .safetensors")
    device = _device(options)
    with ExitStack() as stack:
        source = Hashed(_open(stack, local_path(model), base))
        keys = _keys(source, str(model))
        inputs = (*source.checkpoint.input_paths, *(() if base is None else (base,)))
        if processes.rank == 0:
            StagedFile.check(out, overwrite=options.overwrite, inputs=inputs)
        streamed = StreamedModel(source, keys, device)
        processor = source.checkpoint.processor_directory or local_path(model)
        read = read_data(Path(data), processor, streamed.model, options, device, processes.share)
        running = streamed.model
        room = Room(running, read.batches, kind, options, source.checkpoint.reading_bytes)
        stream = Stream("model", running, read.batches, caller(running), read.first)
        attach(stack, streamed)
        progress.note("hashing the model and finding the input groups")
        root = source.root(bytearray(_BUFFER_BYTES)) if processes.rank == 0 else ""
        names = [target.name for target in find_targets(running)]
        processes.agree("model, data and kind", [names, list(keys.items()), read.sha256, kind])
        groups = discover(stream, names, streamed.residency.blocks, processes)
        streamed.residency.release()
        room.add_repeated(groups.repeated)
        staged = None
        if processes.rank == 0:
            weights = {name: source.digests[keys[f"{name}.weight"]] for name in names}
            header = _header(kind, root, read, options.tokens, groups, streamed, weights)
            layout, again = header.layout(), options.overwrite
            staged = stack.enter_context(StagedFile(out, layout, overwrite=again, inputs=inputs))
        spill = room.spill(stack, Path(out))
        most = _Walk(stream, groups, staged, kind, progress, spill, processes).run()
        if staged is not None:
            staged.commit()
        with processes.exchange():
            size = int(processes.gather(Path(out).stat().st_size if staged else 0)[0][0])
    progress.finish()
    called = [site.modules for site in groups.sites if site.modules]
    return CalibrationReport(
        groups=len(called) + len(groups.repeated),
        layers=sum(map(len, called)) + len(groups.repeated),
        uncalled=groups.uncalled,
        samples=read.samples,
        tokens=most,
        bytes=size,
        seconds=time.perf_counter() - start,
        notes=tuple(note for note in (read.note, room.note) if note),
        processes=processes.count,
        planned=None if room.plan is None else room.plan.bytes,
    )


def _device(options: RunOptions) -> torch.device:
    """Where to run, once ``max_ram`` is known to be there."""
    check_memory(0, options.max_ram)
    return torch.device(options.device)


def _open(stack: ExitStack, model: Path, base: PathLike | None) -> TensorSource:
    if is_adapter(model) and base is None:
        raise UsageError(
            f"{model}: is an adapter; expected the model it was trained on with it; give base"
        )
    if base is None:
        return stack.enter_context(open_checkpoint(model))
    if not is_adapter(model):
        raise UsageError(f"{model}: is no adapter; base {base} would have no use; leave it out")
    ours = stack.enter_context(open_checkpoint(base))
    return stack.enter_context(open_tuned(model, ours, names_as_stored))


def _keys(source: Hashed, where: str) -> dict[str, str]:
    skeleton = skeleton_of(source)
    keys = map_keys(skeleton, source.checkpoint.tensors, where)
    refuse_fused(skeleton, keys, where)
    return keys


def _header(
    kind: Kind,
    root: str,
    data: Data,
    tokens: Tokens,
    groups: Groups,
    streamed: StreamedModel,
    weights: Mapping[str, str],
) -> StatisticsHeader:
    called = [site.modules for site in groups.sites if site.modules]
    layers = (*called, *((name,) for name in groups.repeated))
    cols = input_columns(streamed.model)
    sizes = tuple(cols[group[0]] for group in layers)
    digests = tuple(tuple(weights[name] for name in group) for group in layers)
    return StatisticsHeader(kind, root, data.sha256, data.samples, tokens, layers, digests, sizes)


@dataclass
class _Walk:
    """One pass over the model, group by group."""

    stream: Stream
    groups: Groups
    staged: StagedFile | None  # None in a process that does not write
    kind: Kind
    progress: Progress
    spill: ActivationSpill | None
    processes: Processes

    def run(self) -> int:
        """Write every group; returns the largest number of counted tokens."""
        sites, most, index, written = self.groups.sites, 0, 0, 0
        collector = Collector(self.stream.model, self.groups, self.processes)
        self.progress.start(len(sites))
        with Lockstep([self.stream], sites, spill=self.spill) as lockstep:
            for site in sites:
                if site.modules:
                    tokens, size = self._take(collector, lockstep, site, index)
                    if self.spill is not None:
                        release_free_memory()
                    written += size
                    most, index = max(most, tokens), index + 1
                else:
                    lockstep.gather(site)
                self.progress.group(site.name, site.index + 1, len(sites), written)
        for sums, tokens in collector.repeated_sums(self.stream, self.kind).values():
            self._write(index, sums, tokens)
            most, index = max(most, tokens), index + 1
        return most

    def _take(
        self, collector: Collector, lockstep: Lockstep, site: Site, index: int
    ) -> tuple[int, int]:
        """Write one group, whose sums leave memory with this call; returns tokens and bytes."""
        with naming("statistics", site.modules[0]):
            sums, tokens = collector.sums(lockstep, site, self.stream, self.kind)
        self._write(index, sums, tokens)
        return tokens, sum(t.nbytes for t in sums.values())

    def _write(self, index: int, sums: Mapping[str, torch.Tensor], tokens: int) -> None:
        if self.staged is not None:
            write_group(self.staged, index, sums, tokens)
