"""The walk over a model: statistics, solve and install, input group by input group.

The same walk serves models in memory and models streamed from disk; they differ in the solver's
``Weights`` and in the models that the streams run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from tailor_fast._core.machine import naming, release_free_memory
from tailor_fast.calibration.collect import Collector, Streams
from tailor_fast.calibration.groups import Groups
from tailor_fast.calibration.lockstep import Lockstep, Site
from tailor_fast.calibration.moments import Moments
from tailor_fast.calibration.placement import ON_DEVICE, Placement
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.models import blocks_of
from tailor_fast.patching.solver import AnyMoments, Solver

Progress = Callable[[str, int, int], None]  # (name, done, total)
_Pair = tuple[Moments | None, AnyMoments | None]  # new task, old tasks
OldMoments = Callable[[Sequence[str]], AnyMoments | None]


def silent(_name: str, _done: int, _total: int) -> None:
    """Progress that is told to nobody."""


@dataclass
class Engine:
    """One run over a model's groups.

    Attributes:
        solver: scores, solves and installs.
        groups: how the layers are called.
        streams: the forward passes.
        by_block: take all Grams of a block before its first layer is patched (the authors' order).
        old_moments: gives a group's old-task moments where they come from a file.
        progress: called after each site.
        spill: keeps suspended activations under a budget, and freed memory with the system; None
            keeps both.
        placement: where matrices wait.

    The processes of ``solver`` walk together, each over its own batches.
    """

    solver: Solver
    groups: Groups
    streams: Streams
    by_block: bool = False
    old_moments: OldMoments | None = None
    progress: Progress = silent
    spill: ActivationSpill | None = None
    placement: Placement = ON_DEVICE
    _collector: Collector = field(init=False)
    _repeated: dict[str, _Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.streams.tuned.model
        self._collector = Collector(model, self.groups, self.solver.processes, self.placement)

    def run(self) -> None:
        """Patch every target, in call order."""
        self.solver.leave(self.groups.uncalled, "no batch runs through it")
        if self.solver.needs_scores_first:
            self._score_first()
        self._solve_repeated()
        patched = self.streams.patched
        if self.by_block and patched is not None:
            self._walk_blocks(patched.model)
        else:
            self._walk_groups()

    def _walk_groups(self) -> None:
        sites = self.groups.sites
        with self._lockstep(self.streams, sites) as lockstep:
            for site in sites:
                if site.modules:
                    self._solve(site.modules, *self._collect(lockstep, site, self.streams))
                else:
                    lockstep.gather(site)
                self.progress(site.name, site.index + 1, len(sites))

    def _walk_blocks(self, patched: nn.Module) -> None:
        names = [name for site in self.groups.sites for name in site.modules]
        blocks = blocks_of(self.streams.tuned.model, names)
        sites = with_block_ends(self.groups.sites, blocks)
        members: dict[str, list[str]] = {}
        for name in names:
            members.setdefault(blocks[name] or "", []).append(name)
        waiting: list[tuple[Site, Moments | None, AnyMoments | None]] = []
        with self._lockstep(self.streams, sites, rerun=patched) as lockstep:
            for site in sites:
                block = blocks[site.modules[0]] if site.modules else None
                if block is not None:
                    # Until the block is solved, its layers answer as the tuned ones do.
                    self.solver.preview(members.pop(block, ()))
                    waiting.append((site, *self._collect(lockstep, site, self.streams)))
                elif site.modules:
                    self._solve(site.modules, *self._collect(lockstep, site, self.streams))
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

    def _collect(self, lockstep: Lockstep, site: Site, streams: Streams) -> _Pair:
        if streams is self.streams and self.solver.finished(site.modules):
            lockstep.gather(site)
            return None, None
        with self.solver.report.timed("statistics"), naming("statistics", site.modules[0]):
            new, old = self._collector.both(lockstep, site, streams)
            self._tidy()
        return new, self._old(site.modules, old)

    def _old(self, members: Sequence[str], old: Moments | None) -> AnyMoments | None:
        return old if self.old_moments is None else self.old_moments(members)

    def _solve(
        self,
        members: Sequence[str],
        new: AnyMoments | None,
        old: AnyMoments | None,
        note: str = "",
    ) -> None:
        if new is None and not self.solver.finished(members):
            self.solver.leave(members, "no counted token reaches it")
        else:
            self.solver.solve(members, new, old, note)
        self._tidy()

    def _tidy(self) -> None:
        if self.spill is not None:
            release_free_memory()

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
                    self.solver.score(site.modules, new, old)
        for name, (new, old) in self._repeated_moments().items():
            if new is not None:
                self.solver.score((name,), new, old)
        self.solver.finish_scores()

    def _solve_repeated(self) -> None:
        """Layers that are called several times have no one input: no propagation for them."""
        note = "called several times in a pass: solved with propagate 'none'"
        moments: dict[str, _Pair] = dict.fromkeys(self.groups.repeated, (None, None))
        if not self.solver.finished(moments):
            moments = self._repeated_moments()
        for name, (new, old) in moments.items():
            self._solve((name,), new, old, note)
        self._repeated.clear()

    def _repeated_moments(self) -> dict[str, _Pair]:
        if self.groups.repeated and not self._repeated:
            new = self._collector.repeated(self.streams.tuned)
            old_base = self.streams.old_base
            old = {} if old_base is None else self._collector.repeated(old_base)
            self._repeated = {
                name: (new[name], self._old((name,), old.get(name)))
                for name in self.groups.repeated
            }
        return self._repeated


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
