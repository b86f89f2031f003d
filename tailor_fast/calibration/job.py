"""``calibrate``: a model's statistics on data, to a file, for any number of recipes."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.collect import Collector
from tailor_fast.calibration.data import Data, read_data
from tailor_fast.calibration.groups import Groups, discover
from tailor_fast.calibration.lockstep import Lockstep, Stream
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.calibration.statfile import Kind, StatisticsHeader, write_group
from tailor_fast.calibration.streamed import StreamedModel, attach, skeleton_of
from tailor_fast.checkpoint import Hashed, StagedFile, open_checkpoint
from tailor_fast.models import caller, find_targets, map_keys
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
    """

    groups: int
    layers: int
    uncalled: tuple[str, ...]
    samples: int
    tokens: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def calibrate(
    model: PathLike,
    data: PathLike,
    out: PathLike,
    *,
    kind: Kind = "full",
    tokens: Tokens = "all",
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Run samples through a model and write the second moments of its layers' inputs.

    One block of the model and the sums of one input group are in memory at a time.

    Args:
        model: checkpoint directory.
        data: samples, JSON lines.
        out: file to make, named ``*.safetensors``.
        kind: ``full`` keeps the Gram of each group's inputs, ``diag`` its diagonal alone.
        tokens: ``all``, or those of the answers alone.
        options: device, memory and the like.
        progress: told about each group.

    Raises:
        InputError: model, processor or data are not usable.
        OutputError: ``out`` exists, is locked, or may not be written.
        StorageError: reading or writing failed half way.
        UsageError: ``out`` has another ending.
    """
    start = time.perf_counter()
    options, progress = options or RunOptions(), progress or Silent()
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"{out}: expected a name that ends in .safetensors")
    device = torch.device(options.device)
    with ExitStack() as stack:
        source = Hashed(stack.enter_context(open_checkpoint(model)))
        keys = map_keys(skeleton_of(source), source.checkpoint.tensors, str(model))
        streamed = StreamedModel(source, keys, device)
        read = read_data(Path(data), Path(model), streamed, options, device, tokens)
        stream = Stream("model", streamed.model, read.batches, caller(streamed.model))
        attach(stack, streamed)
        progress.note("hashing the model and finding the input groups")
        root = source.root(bytearray(_BUFFER_BYTES))
        names = [target.name for target in find_targets(streamed.model)]
        groups = discover(stream, names, streamed.residency.blocks)
        streamed.residency.release()
        header = _header(kind, root, read, tokens, groups, streamed)
        staged = stack.enter_context(
            StagedFile(
                out,
                header.layout(),
                overwrite=options.overwrite,
                inputs=source.checkpoint.input_paths,
            )
        )
        spill = None
        if options.max_ram is not None:
            spill = ActivationSpill(options.max_ram, Path(out).absolute().parent)
            stack.callback(spill.close)
        most = _Walk(stream, groups, staged, kind, progress, spill).run()
        staged.commit()
    progress.finish()
    return CalibrationReport(
        groups=len(header.groups),
        layers=sum(len(group) for group in header.groups),
        uncalled=groups.uncalled,
        samples=read.samples,
        tokens=most,
        bytes=Path(out).stat().st_size,
        seconds=time.perf_counter() - start,
        notes=(read.note,) if read.note else (),
    )


def _header(
    kind: Kind,
    root: str,
    data: Data,
    tokens: Tokens,
    groups: Groups,
    streamed: StreamedModel,
) -> StatisticsHeader:
    called = [site.modules for site in groups.sites if site.modules]
    layers = (*called, *((name,) for name in groups.repeated))
    transposed = {target.name: target.transposed for target in find_targets(streamed.model)}

    def cols(name: str) -> int:
        weight = streamed.model.get_submodule(name).weight
        return int(weight.shape[0 if transposed[name] else 1])  # type: ignore[index]  # untyped attribute

    sizes = tuple(cols(group[0]) for group in layers)
    return StatisticsHeader(kind, root, data.sha256, data.samples, tokens, layers, sizes)


@dataclass
class _Walk:
    """One pass over the model, group by group."""

    stream: Stream
    groups: Groups
    staged: StagedFile
    kind: Kind
    progress: Progress
    spill: ActivationSpill | None

    def run(self) -> int:
        """Write every group; returns the largest number of counted tokens."""
        sites, most, index, written = self.groups.sites, 0, 0, 0
        collector = Collector(self.stream.model, self.groups)
        self.progress.start(len(sites))
        with Lockstep([self.stream], sites, spill=self.spill) as lockstep:
            for site in sites:
                if site.modules:
                    sums, tokens = collector.sums(lockstep, site, self.stream, self.kind)
                    write_group(self.staged, index, sums, tokens)
                    written += sum(t.numel() * t.element_size() for t in sums.values())
                    most, index = max(most, tokens), index + 1
                else:
                    lockstep.gather(site)
                self.progress.group(site.name, site.index + 1, len(sites), written)
        for sums, tokens in collector.repeated_sums(self.stream, self.kind).values():
            write_group(self.staged, index, sums, tokens)
            most, index = max(most, tokens), index + 1
        return most
