"""Fills the cells of a plan: trains what is missing, chooses on validation scenes, then tests."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import Cell, Key, Store, setting_text
from benchmarks.quality.protocols import PROTOCOLS, Protocol
from benchmarks.quality.rows import ROWS, Hyper, Row
from benchmarks.quality.scenes import Split
from benchmarks.quality.training import Made


@dataclass(frozen=True)
class Plan:
    """What is to be measured: every combination.

    Attributes:
        protocols: keys of ``PROTOCOLS``.
        pretraining_seeds: of the base models.
        finetuning_seeds: of the fine-tuned ones.
        rows: keys of ``ROWS``.
        densities: shares of the weights that sparse methods may change.
    """

    protocols: Sequence[str]
    pretraining_seeds: Sequence[int]
    finetuning_seeds: Sequence[int]
    rows: Sequence[str]
    densities: Sequence[float]

    def pairs(self) -> Iterator[tuple[str, int, int]]:
        """Yield every pair of models, all seeds of one protocol together."""
        yield from product(self.protocols, self.pretraining_seeds, self.finetuning_seeds)


class Runner:
    """Runs a plan.

    Args:
        work: folder of checkpoints and cells.
        store: cells measured so far.
        report: called with a line of progress at a time.
        protocols: those that plans name; None: ``PROTOCOLS``.
        bench: made from a protocol, its two checkpoints and a seed; None: ``Bench``.
    """

    def __init__(
        self,
        work: Path,
        store: Store,
        report: Callable[[str], None] = print,
        protocols: Mapping[str, Protocol] | None = None,
        bench: Callable[[Any, Made, Made, int], Bench] | None = None,
    ) -> None:
        self._work = work
        self._store = store
        self._report = report
        self._protocols = PROTOCOLS if protocols is None else protocols
        self._bench = bench or Bench

    def run(self, plan: Plan) -> list[Cell]:
        """Measure what is missing and return the plan's test cells."""
        return [
            cell
            for protocol, pretraining, finetuning in plan.pairs()
            for cell in self._pair(plan, protocol, pretraining, finetuning)
        ]

    def _pair(self, plan: Plan, protocol: str, pretraining: int, finetuning: int) -> Iterator[Cell]:
        chosen = self._protocols[protocol]
        base, tuned = chosen.make(self._work, pretraining, finetuning, self._report)
        bench: Bench | None = None

        def lazily() -> Bench:
            nonlocal bench
            bench = bench or self._bench(chosen, base, tuned, finetuning)
            return bench

        for name in plan.rows:
            row = ROWS[name]
            for density in plan.densities if row.has_density else [1.0]:
                key = Key(
                    protocol, pretraining, finetuning, name, density, "", "", tuned.fingerprint[:12]
                )
                began = time.perf_counter()
                cell = self._row(row, key, lazily)
                seconds = time.perf_counter() - began
                scores = cell.scores
                self._report(
                    f"{protocol} {pretraining}/{finetuning} {name} {density:g}: old"
                    f" {scores.old_mean:.1f}, new {scores.new:.1f}, H {scores.h_mean:.1f}"
                    f" {cell.key.setting} ({seconds:.0f} s)"
                )
                yield cell

    def _row(self, row: Row, key: Key, bench: Callable[[], Bench]) -> Cell:
        best: Hyper = row.grid[0]
        if len(row.grid) > 1:
            # The first of equals: max keeps the earlier one.
            best = max(
                row.grid,
                key=lambda hyper: self._cell(row, hyper, key, "validation", bench).scores.h_mean,
            )
        return self._cell(row, best, key, "test", bench)

    def _cell(
        self, row: Row, hyper: Hyper, key: Key, split: Split, bench: Callable[[], Bench]
    ) -> Cell:
        full = replace(key, setting=setting_text(hyper), split=split)
        known = self._store.get(full)
        if known is not None:
            return known
        found = bench()
        result = found.measure(lambda: row.make(found, key.density, hyper), split)
        return self._store.add(full, result)
