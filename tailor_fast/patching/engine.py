"""The walk over a model: statistics, solve and install, input group by input group.

The same walk serves models in memory and models streamed from disk; they differ in ``Weights`` and
in the models that the streams run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tailor_fast.models import Target, TokenMasks, blocks_of
from tailor_fast.patching.groups import Groups
from tailor_fast.patching.lockstep import Lane, Lockstep, Site, Stream, run_all
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.scores import column_weight
from tailor_fast.patching.solving import GroupInputs, Masks, Weights, left_at_base, solve_layer
from tailor_fast.patching.spill import ActivationSpill
from tailor_fast.patching.statistics import Moments, MomentSums

Progress = Callable[[str, int, int], None]  # (what, done, total)


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


@dataclass
class Engine:
    """One run.

    Attributes:
        recipe: what to do.
        weights: where layers come from and go to.
        targets: the layers to patch, by name.
        groups: how they are called.
        streams: the forward passes.
        report: filled in.
        progress: called after each group.
        spill: keeps suspended activations under a budget; None keeps them in memory.
    """

    recipe: Recipe
    weights: Weights
    targets: Mapping[str, Target]
    groups: Groups
    streams: Streams
    report: Report
    progress: Progress = lambda _what, _done, _total: None
    spill: ActivationSpill | None = None
    _moments: dict[str, tuple[Moments | None, Moments | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.streams.tuned.model
        self._blocks = blocks_of(model, self.targets)
        self._tokens = TokenMasks(model)
        self._masks = Masks(self.recipe, units_of(self.recipe, model, self.targets))

    def run(self) -> None:
        """Patch every target, in call order."""
        for name in self.groups.uncalled:
            target = self.targets[name]
            note = "left at base: no batch runs through it"
            self.report.linears.append(left_at_base(target, self.weights.pair(target), note))
        if self._masks.needs_scores_first:
            self._score_first()
        if self.groups.repeated:
            self._solve_repeated()
        patched = self.streams.patched
        if self.recipe.group == "block" and patched is not None:
            self._by_block(patched.model)
        else:
            self._by_group()

    def _by_group(self) -> None:
        with self._lockstep(self.streams, self.groups.sites) as lockstep:
            for site in self.groups.sites:
                if site.modules:
                    new, old = self._collect(lockstep, site, self.streams)
                    self._solve(site.modules, new, old)
                else:
                    lockstep.gather(site)
                self.progress(site.name, site.index + 1, len(self.groups.sites))

    def _by_block(self, patched: nn.Module) -> None:
        """The authors' order: all Grams of a block before its first layer is patched."""
        sites = with_block_ends(self.groups.sites, self._blocks)
        entered: set[str] = set()
        waiting: list[tuple[Site, Moments | None, Moments | None]] = []
        with self._lockstep(self.streams, sites, rerun=patched) as lockstep:
            for site in sites:
                if site.modules:
                    block = self._blocks[site.modules[0]]
                    if block is not None and block not in entered:
                        entered.add(block)
                        self._preview(sites, block)
                    new, old = self._collect(lockstep, site, self.streams)
                    if block is None:
                        self._solve(site.modules, new, old)
                    else:
                        waiting.append((site, new, old))
                else:
                    lockstep.gather(site)
                if site.behind is not None:
                    for group, new, old in waiting:
                        self._solve(group.modules, new, old)
                    waiting.clear()
                self.progress(site.name, site.index + 1, len(sites))

    def _lockstep(
        self, streams: Streams, sites: Sequence[Site], rerun: nn.Module | None = None
    ) -> Lockstep:
        return Lockstep(streams.running(), sites, rerun=rerun, spill=self.spill)

    def _preview(self, sites: Sequence[Site], block: str) -> None:
        for site in sites:
            if site.modules and self._blocks[site.modules[0]] == block:
                for name in site.modules:
                    self.weights.preview(self.targets[name])

    def _collect(
        self, lockstep: Lockstep, site: Site, streams: Streams
    ) -> tuple[Moments | None, Moments | None]:
        with self._timed("statistics"):
            new = self._moments_of(lockstep, site, *streams.new)
            old = None if streams.old is None else self._moments_of(lockstep, site, *streams.old)
        return new, old

    def _moments_of(
        self, lockstep: Lockstep, site: Site, actual: Stream, target: Stream | None
    ) -> Moments | None:
        name = site.modules[0]
        sums = MomentSums(name)
        if target is None:
            for lane in lockstep.arrive(actual.name, site):
                sums.add(_input(lane), None, self._mask(name, lane), _where(lane))
            return sums.finish()
        for lane, answer in lockstep.arrive_paired(actual.name, target.name, site):
            sums.add(_input(lane), _input(answer), self._mask(name, lane), _where(lane))
        return sums.finish()

    def _mask(self, name: str, lane: Lane) -> torch.Tensor | None:
        return self._tokens.find(name, _input(lane), lane.batch)

    def _weight(
        self, members: Sequence[str], new: Moments | None, old: Moments | None
    ) -> torch.Tensor | None:
        recipe = self.recipe
        if new is None or recipe.salience_weight == 1.0 or recipe.decorate == "official":
            return None
        with self._timed("scores"):
            return column_weight(recipe.sensitivity, new, old, recipe.percdamp, members[0])

    def _solve(
        self,
        members: Sequence[str],
        new: Moments | None,
        old: Moments | None,
        note: str = "",
    ) -> None:
        if new is None:
            for name in members:
                target = self.targets[name]
                note = "left at base: no token of any batch reaches it"
                self.report.linears.append(left_at_base(target, self.weights.pair(target), note))
            return
        weight = None if self._masks.needs_scores_first else self._weight(members, new, old)
        inputs = GroupInputs(tuple(members), new, old, weight)
        for name in members:
            with self._timed("solve"):
                pair = self.weights.pair(self.targets[name])
                patched, report = solve_layer(
                    self.targets[name], pair, inputs, self._masks, self.recipe
                )
            report.note = note
            with self._timed("install"):
                self.weights.install(self.targets[name], patched)
            self.report.linears.append(report)

    def _score_first(self) -> None:
        """Scores of every layer from the tuned model's inputs, for scopes that span layers."""
        streams = Streams(self.streams.tuned, old_base=self.streams.old_base)
        with self._lockstep(streams, self.groups.sites) as lockstep:
            for site in self.groups.sites:
                if not site.modules:
                    lockstep.gather(site)
                    continue
                new, old = self._collect(lockstep, site, streams)
                if new is not None:
                    weight = self._weight(site.modules, new, old)
                    for name in site.modules:
                        self._masks.add(name, weight)
        if self.groups.repeated:
            for name, (new, old) in self._repeated_moments().items():
                if new is not None:
                    self._masks.add(name, self._weight((name,), new, old))
        with self._timed("scores"):
            self._masks.observe_all(self.targets, self.weights)

    def _solve_repeated(self) -> None:
        """Layers that are called several times have no one input: no propagation for them."""
        note = "called several times in a pass: solved with propagate 'none'"
        for name, (new, old) in self._repeated_moments().items():
            self._solve((name,), new, old, note)
        self._moments.clear()

    def _repeated_moments(self) -> dict[str, tuple[Moments | None, Moments | None]]:
        if not self._moments:
            new = self._all_calls(self.streams.tuned)
            old_base = self.streams.old_base
            old = {} if old_base is None else self._all_calls(old_base)
            self._moments = {name: (new[name], old.get(name)) for name in self.groups.repeated}
        return self._moments

    def _all_calls(self, stream: Stream) -> dict[str, Moments | None]:
        sums = {name: MomentSums(name) for name in self.groups.repeated}
        modules = dict(stream.model.named_modules())
        batch = 0

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
                mask = self._tokens.find(name, args[0], stream.batches[batch])
                sums[name].add(args[0], None, mask, f"{stream.name} batch {batch}")

            return add

        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in sums]
        try:
            for done in run_all(stream):
                batch = done + 1
        finally:
            for handle in handles:
                handle.remove()
        return {name: total.finish() for name, total in sums.items()}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + spent


def units_of(recipe: Recipe, model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Unit of each layer for scopes that span layers; empty for scopes within one.

    A layer outside every block is a unit of its own under scope ``layer``.
    """
    if recipe.scope == "global":
        return dict.fromkeys(targets, "model")
    if recipe.scope == "layer":
        return {name: block or name for name, block in blocks_of(model, targets).items()}
    return {}


def with_block_ends(sites: Sequence[Site], blocks: Mapping[str, str | None]) -> list[Site]:
    """Add a site behind each block, and number the sites anew."""
    last: dict[str, int] = {}
    for position, site in enumerate(sites):
        block = blocks[site.modules[0]] if site.modules else None
        if block is not None:
            last[block] = position
    order: list[Site] = []
    for position, site in enumerate(sites):
        order.append(replace(site, index=len(order)))
        block = blocks[site.modules[0]] if site.modules else None
        if block is not None and last[block] == position:
            order.append(Site(len(order), behind=block))
    return order


def _input(lane: Lane) -> torch.Tensor:
    if lane.x is None:
        raise RuntimeError(f"{lane.stream} batch {lane.batch_index} does not stand at a site")
    return lane.x


def _where(lane: Lane) -> str:
    return f"{lane.stream} batch {lane.batch_index}"
