"""Input groups: layers that read the same tensor share one Gram and are solved together."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.lockstep import Batch, Site, Stream, run_all


@dataclass(frozen=True)
class Groups:
    """How a model's targets are called in one forward pass."""

    sites: tuple[Site, ...]  # one per input group (and block entry), in call order
    repeated: tuple[str, ...]  # called several times in a pass
    uncalled: tuple[str, ...]  # never called


_ENTRY = "enter "  # marks the entry of a block among the groups


@dataclass
class _Recorder:
    """Records one forward pass: which targets are called, and on which live tensor."""

    order: list[list[str]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    _live: list[tuple[weakref.ref[torch.Tensor], int, list[str]]] = field(default_factory=list)

    def hook(self, name: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            x: torch.Tensor = args[0]
            self._live = [entry for entry in self._live if entry[0]() is not None]
            for reference, version, members in self._live:
                if reference() is x and version == int(x._version):
                    members.append(name)
                    return
            self.order.append([name])
            self._live.append((weakref.ref(x), x._version, self.order[-1]))

        return record

    def entry_hook(self, block: str) -> Any:
        def record(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            name = _ENTRY + block
            self.calls[name] = self.calls.get(name, 0) + 1
            self.order.append([name])

        return record


def signature(batch: Any) -> tuple[str, ...]:
    """The inputs that a batch has: batches with other inputs may take another way."""
    if isinstance(batch, Mapping):
        return tuple(sorted(key for key, value in batch.items() if value is not None))
    return (type(batch).__name__,)


def discover(
    stream: Stream,
    targets: Collection[str],
    barriers: Collection[str] = (),
    processes: Processes = ALONE,
) -> Groups:
    """Find the input groups by one plain forward pass per kind of batch.

    Two layers share a group when they are called with the same live tensor object, unchanged in
    between. A layer called several times in a pass has several inputs and belongs to no group.

    Args:
        stream: model and batches; the first batch of each signature is run.
        targets: names of the layers to look for.
        barriers: blocks before which all lanes wait; one that is entered several times is no
            barrier.
        processes: whose batches count as well; all find the same groups.
    """
    firsts: dict[tuple[str, ...], Batch] = {}
    for batch in stream.batches:
        firsts.setdefault(signature(batch), batch)
    records = [(kind, *_record(stream, batch, targets, barriers)) for kind, batch in firsts.items()]
    merged: list[list[str]] = []
    calls: dict[str, int] = {}
    seen: set[tuple[str, ...]] = set()
    for kind, order, counts in chain.from_iterable(processes.gather_json(records)):
        if tuple(kind) not in seen:
            seen.add(tuple(kind))
            _merge(merged, order)
            for name, count in counts.items():
                calls[name] = max(calls.get(name, 0), count)
    repeated = {name for name, count in calls.items() if count > 1}
    kept = [[name for name in group if name not in repeated] for group in merged]
    return Groups(
        tuple(_site(index, group) for index, group in enumerate(g for g in kept if g)),
        tuple(name for name in targets if name in repeated),
        tuple(name for name in targets if name not in calls),
    )


def _record(
    stream: Stream, batch: Batch, targets: Collection[str], barriers: Collection[str]
) -> tuple[list[list[str]], dict[str, int]]:
    """The groups of one forward pass in order, and how often each layer is called."""
    modules = dict(stream.model.named_modules())
    recorder = _Recorder()
    handles = [modules[n].register_forward_pre_hook(recorder.hook(n)) for n in targets]
    for block in barriers:
        hook = recorder.entry_hook(block)
        handles.append(modules[block].register_forward_pre_hook(hook, prepend=True))
    try:
        for _ in run_all(Stream(stream.name, stream.model, [batch], stream.call)):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return recorder.order, recorder.calls


def _site(index: int, group: Sequence[str]) -> Site:
    if group[0].startswith(_ENTRY):
        return Site(index, enter=group[0].removeprefix(_ENTRY))
    return Site(index, tuple(group))


def _merge(order: list[list[str]], other: Sequence[list[str]]) -> None:
    """Insert the groups of another pass behind the group that they followed there."""
    place = {name: index for index, group in enumerate(order) for name in group}
    after = -1
    for group in other:
        new = [name for name in group if name not in place]
        known = [place[name] for name in group if name in place]
        if known:
            after = max(after, *known)
        if new:
            after += 1
            order.insert(after, new)
            place = {name: index for index, members in enumerate(order) for name in members}
