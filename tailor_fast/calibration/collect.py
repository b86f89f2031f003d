"""Moments of each input group, from the lanes that stand before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.groups import Groups
from tailor_fast.calibration.lockstep import Lane, Lockstep, Site, Stream, run_all
from tailor_fast.calibration.moments import BatchName, DiagonalSums, Moments, MomentSums
from tailor_fast.calibration.placement import ON_DEVICE, Placement
from tailor_fast.calibration.statfile import Kind
from tailor_fast.models import TokenMasks, aligned


@dataclass(frozen=True)
class Streams:
    """The streams of one run; None where the recipe does not need one.

    Attributes:
        tuned: tuned model on the new task.
        patched: patched model on the new task; None without propagation.
        paired: whether the patched stream is compared with the tuned one (asymmetric).
        old_base: base model on old tasks; None without retention.
        old_patched: patched model on old tasks; None where the base stream stands for it.
    """

    tuned: Stream
    patched: Stream | None = None
    paired: bool = False
    old_base: Stream | None = None
    old_patched: Stream | None = None

    @property
    def new(self) -> tuple[Stream, Stream | None]:
        """(actual, target) on the new task; target None where the two are one."""
        if self.patched is None:
            return self.tuned, None
        return self.patched, self.tuned if self.paired else None

    @property
    def old(self) -> tuple[Stream, Stream | None] | None:
        """(actual, target) on old tasks; None without retention."""
        if self.old_base is None:
            return None
        if self.old_patched is None:
            return self.old_base, None
        return self.old_patched, self.old_base

    def running(self) -> list[Stream]:
        """The streams whose forward passes are needed."""
        streams = (*self.new, *(self.old or ()))
        return [stream for stream in streams if stream is not None]


class Collector:
    """Takes moments at sites, and those of layers that are called several times in a pass.

    Args:
        model: one of the models that run, to tell text from images.
        groups: how the layers are called.
        processes: whose sums are added up.
        placement: where matrices wait.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        processes: Processes = ALONE,
        placement: Placement = ON_DEVICE,
    ) -> None:
        self._placement = placement
        self._tokens = TokenMasks(model)
        self._groups = groups
        self._processes = processes

    def both(
        self, lockstep: Lockstep, site: Site, streams: Streams
    ) -> tuple[Moments | None, Moments | None]:
        """Moments of the new task and of old tasks; None where no token was counted."""
        new = self.at(lockstep, site, *streams.new)
        if streams.old is None:
            return new, None
        if new is None or not self._placement.new_waits:
            return new, self.at(lockstep, site, *streams.old)
        new = new.waiting()
        old = self.at(lockstep, site, *streams.old)
        return new.back(), old

    def at(
        self, lockstep: Lockstep, site: Site, actual: Stream, target: Stream | None
    ) -> Moments | None:
        """Moments of one pair of streams at ``site``, batch by batch in order."""
        name = site.modules[0]
        sums = MomentSums(name)
        if target is None:
            for lane in lockstep.arrive(actual.name, site):
                sums.add(_input(lane), self._mask(name, lane), _where(lane))
        else:
            for lane, answer in lockstep.arrive_paired(actual.name, target.name, site):
                x, target_x = _input(lane), _input(answer)
                target_x, there = aligned(target_x, x), _where(answer)
                sums.add(x, self._mask(name, lane), _where(lane), target_x, there)
        sums.add_up(self._processes)
        moments = sums.finish()
        if moments is None or not self._placement.differences_on_host:
            return moments
        return moments.without_differences()

    def sums(
        self, lockstep: Lockstep, site: Site, stream: Stream, kind: Kind
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Sums of one stream at ``site`` by name, and the counted tokens; for statistics files."""
        sums = _new_sums(kind, site.modules[0])
        for lane in lockstep.arrive(stream.name, site):
            sums.add(_input(lane), self._mask(site.modules[0], lane), _where(lane))
        sums.add_up(self._processes)
        return sums.sums()

    def repeated(self, stream: Stream) -> dict[str, Moments | None]:
        """Moments over all calls of each layer that is called several times in a pass."""
        sums = {name: MomentSums(name) for name in self._groups.repeated}
        self._add_all_calls(stream, sums)
        return {name: total.finish() for name, total in sums.items()}

    def repeated_sums(
        self, stream: Stream, kind: Kind
    ) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
        """The same as sums; for statistics files."""
        sums = {name: _new_sums(kind, name) for name in self._groups.repeated}
        self._add_all_calls(stream, sums)
        return {name: total.sums() for name, total in sums.items()}

    def _add_all_calls(self, stream: Stream, sums: Mapping[str, MomentSums | DiagonalSums]) -> None:
        if not sums:
            return
        modules = dict(stream.model.named_modules())
        batch = 0

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
                mask = self._tokens.find(name, args[0], stream.batches[batch])
                where = _named(stream.name, stream.first + batch, stream.batches[batch])
                sums[name].add(args[0], mask, where)

            return add

        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in sums]
        try:
            for done in run_all(stream):
                batch = done + 1
        finally:
            for handle in handles:
                handle.remove()
        for total in sums.values():
            total.add_up(self._processes)

    def _mask(self, name: str, lane: Lane) -> torch.Tensor | None:
        return self._tokens.find(name, _input(lane), lane.batch)


def _new_sums(kind: Kind, name: str) -> MomentSums | DiagonalSums:
    return MomentSums(name) if kind == "full" else DiagonalSums(name)


def _input(lane: Lane) -> torch.Tensor:
    if lane.x is None:
        raise RuntimeError(f"{lane.stream} batch {lane.batch_index} does not stand at a site")
    return lane.x


def _where(lane: Lane) -> BatchName:
    return _named(lane.stream, lane.batch_index, lane.batch)


def _named(stream: str, index: int, batch: Any) -> BatchName:
    name = BatchName(f"{stream} batch {index}")
    name.samples = getattr(batch, "samples", ())
    return name
