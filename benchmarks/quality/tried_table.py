"""The table of what was tried for the goals, from the cells of ``benchmarks.quality.tried``."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.quality.cells import Cell
from benchmarks.quality.report import Spread
from benchmarks.quality.tried import GOALS, TRIES
from tailor_fast.patching.recipe import MEASURED_RETAIN

Pairs = Mapping[tuple[str, int], Cell]


def table(cells: Sequence[Cell]) -> str:
    """Return Markdown: kept shares and H-mean by protocol, and each try's price.

    Kept is against the base model's and the fine-tuned model's accuracy on the same scenes.
    *change* is the mean difference of H-mean to the defaults on the same pairs of models, *time*
    the processor time over theirs.
    """
    rows: dict[str, dict[tuple[str, int], Cell]] = {}
    for cell in cells:
        if cell.key.protocol not in GOALS:
            continue
        place = (cell.key.protocol, cell.key.finetuning_seed)
        rows.setdefault(cell.key.row, {})[place] = cell
    names = [name for name in GOALS if any(name == place[0] for place in rows["base"])]
    head = ["", *(f"`{name}`: old kept | new kept | H-mean" for name in names), "change", "time"]
    count = 3 + 3 * len(names)
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (count - 1)}"]
    for row, attempt in TRIES.items():
        if row not in rows:
            continue
        shown = [part for name in names for part in _of(rows, row, name)]
        lines.append(f"| {' | '.join([attempt.title, *shown, *_price(rows, row)])} |")
    return "\n".join(lines)


def _of(rows: Mapping[str, Pairs], row: str, protocol: str) -> list[str]:
    places = [place for place in rows[row] if place[0] == protocol]
    figures = [
        rows[row][place].scores.figures(rows["base"][place].scores, rows["tuned"][place].scores)
        for place in places
    ]
    names = ("old kept", "new kept", "H-mean")
    if not places:
        return [""] * len(names)
    return [str(Spread.of([one[name] for one in figures])) for name in names]


def _price(rows: Mapping[str, Pairs], row: str) -> list[str]:
    usual, found = rows["defaults"], rows[row]
    seconds = sum(cell.cpu_seconds for cell in found.values())
    time = f"{seconds / sum(usual[place].cpu_seconds for place in found):.1f}"
    if row == "defaults":
        return ["", time]
    changes = [cell.scores.h_mean - usual[place].scores.h_mean for place, cell in found.items()]
    return [f"{statistics.fmean(changes):+.1f}", time]


def factors(cells: Sequence[Cell]) -> str:
    """Return Markdown: H-mean by protocol for each factor of the measured retention weight."""
    found: dict[float, dict[tuple[str, int], float]] = {}
    for cell in cells:
        factor = _factor(cell.key.row)
        if factor is not None:
            place = (cell.key.protocol, cell.key.finetuning_seed)
            found.setdefault(factor, {})[place] = cell.scores.h_mean
    names = list(dict.fromkeys(name for name, _ in found[MEASURED_RETAIN]))
    head = ["factor", *(f"`{name}`" for name in names), "mean"]
    lines = [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}"]
    for factor, values in sorted(found.items()):
        shown = [
            str(Spread.of([value for place, value in values.items() if place[0] == name]))
            for name in names
        ]
        title = f"**{factor:g}**" if factor == MEASURED_RETAIN else f"{factor:g}"
        lines.append(
            f"| {' | '.join([title, *shown, f'{statistics.fmean(values.values()):.2f}'])} |"
        )
    return "\n".join(lines)


def _factor(row: str) -> float | None:
    """The factor of the measured weight that a row has, where it differs in nothing else."""
    if row == "defaults":
        return MEASURED_RETAIN
    return float(row.removeprefix("factor ")) if row.startswith("factor ") else None
