"""What the library set out to reach, each goal with the figure that was measured for it."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.report import Line
from benchmarks.quality.rows import ROWS

OURS = "default-retain"  # chooses nothing, neither on validation scenes nor on others


class Goal(NamedTuple):
    """Floors of figures of the defaults with old data, at one density of one protocol.

    Attributes:
        protocol: where.
        density: of the patch.
        floors: by figure, percent; empty asks for an H-mean above that of every other method.
    """

    protocol: str
    density: float
    floors: dict[str, float]


_KEPT = {"old_kept": 99.0, "new_kept": 97.0}
_WORDS = {"old_kept": "old kept", "new_kept": "new kept", "h_mean": "H-mean"}
GOALS = (
    Goal("gentle-code", 0.1, _KEPT),
    Goal("gentle-next", 0.1, _KEPT),
    Goal("gentle-code", 0.05, _KEPT),
    Goal("gentle-next", 0.05, _KEPT),
    Goal("hard-code", 0.1, {}),
    Goal("hard-next", 0.1, {}),
    Goal("qformer-next", 0.1, {"h_mean": 63.0}),
    Goal("qformer-next", 0.2, {"h_mean": 73.0}),
)


def table(lines: Sequence[Line]) -> str:
    """Return the goals as a Markdown table; one that was not measured is said to be so."""
    head = "| protocol | density | goal | measured | pairs | |"
    marks = "| --- | ---: | --- | --- | ---: | --- |"
    return "\n".join([head, marks, *(_row(goal, lines) for goal in GOALS)])


def _row(goal: Goal, lines: Sequence[Line]) -> str:
    line = _find(lines, goal, OURS)
    wanted, found, met, pairs = _asked(goal), "", "not run", ""
    if line is not None:
        pairs = str(line.count)
        if goal.floors:
            spreads = line.spreads
            found = ", ".join(f"{_WORDS[name]} {spreads[name].mean:.1f}" for name in goal.floors)
            reached = all(spreads[name].mean >= floor for name, floor in goal.floors.items())
        else:
            rival = best_other(lines, goal)
            own, other = line.spreads["h_mean"].mean, rival.spreads["h_mean"].mean
            found = f"H-mean {own:.1f}; next is {rival.row}, {other:.1f}"
            reached = own > other
        met = "met" if reached else "**missed**"
    return f"| `{goal.protocol}` | {goal.density:g} | {wanted} | {found} | {pairs} | {met} |"


def best_other(lines: Sequence[Line], goal: Goal) -> Line:
    """Return the method of others with the best H-mean, dense ones included.

    The points of WiSE-FT's curve count each, so that it has the best of them, chosen on the test
    scenes.
    """
    others = [
        line
        for line in lines
        if line.protocol == goal.protocol
        and ROWS[line.row].kind != "ours"
        and (not ROWS[line.row].has_density or line.density <= goal.density)
    ]
    return max(others, key=lambda line: line.spreads["h_mean"].mean)


def _asked(goal: Goal) -> str:
    if not goal.floors:
        return "H-mean above every other method's"
    return ", ".join(f"{_WORDS[name]} ≥ {floor:g}" for name, floor in goal.floors.items())


def _find(lines: Sequence[Line], goal: Goal, row: str) -> Line | None:
    chosen = (line for line in lines if (line.protocol, line.row) == (goal.protocol, row))
    return next((line for line in chosen if line.density == goal.density), None)
