"""The table of the defaults' neighbours, from the cells of ``benchmarks.quality.defaults``."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.quality.cells import Cell
from benchmarks.quality.choices import CHOICES, DEFAULTS, Choice, row, setting
from benchmarks.quality.report import Spread

Pair = tuple[str, int]


def table(cells: Sequence[Cell], retain: bool) -> str:
    """Return one half as Markdown: H-mean by protocol, and what a departure changes.

    ``change`` is the mean over all pairs of models of the H-mean's change against the defaults on
    the same pair, ``worst`` the mean change of the protocol that loses most.
    """
    found = {
        choice.title: _by_pair(cells, choice, retain)
        for choice in CHOICES[retain]
        if _by_pair(cells, choice, retain)
    }
    usual = found[DEFAULTS.title]
    names = list(dict.fromkeys(name for name, _ in usual))
    head = ["", *(f"`{name}`" for name in names), "change", "worst"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for title, values in found.items():
        changes = {pair: value - usual[pair] for pair, value in values.items()}
        parts = [list(_of(changes, name).values()) for name in names if _of(changes, name)]
        ends = [
            f"{statistics.fmean(changes.values()):+.1f}",
            f"{min(map(statistics.fmean, parts)):+.1f}",
        ]
        shown = [_spread(_of(values, name)) for name in names]
        lines.append([title, *shown, *(["", ""] if title == DEFAULTS.title else ends)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_pair(cells: Sequence[Cell], choice: Choice, retain: bool) -> dict[Pair, float]:
    """H-mean by protocol and fine-tuning seed."""
    wanted = row(retain), setting(choice)
    return {
        (cell.key.protocol, cell.key.finetuning_seed): cell.scores.h_mean
        for cell in cells
        if (cell.key.row, cell.key.setting) == wanted
    }


def _of(values: Mapping[Pair, float], name: str) -> dict[Pair, float]:
    return {pair: value for pair, value in values.items() if pair[0] == name}


def _spread(values: Mapping[Pair, float]) -> str:
    return str(Spread.of(list(values.values()))) if values else ""
