"""A goal is met by the figure that it asks for, missed below it, and not run without it."""

from benchmarks.quality import goals
from benchmarks.quality.report import Line, Spread


def line(protocol: str, row: str, density: float, **figures: float) -> Line:
    spreads = {name: Spread(value, 0.5) for name, value in figures.items()}
    return Line(protocol, row, density, 3, spreads, ("{}",))


def _verdicts(lines: list[Line]) -> dict[tuple[str, str], str]:
    cells = [row.split("|") for row in goals.table(lines).splitlines()[2:]]
    return {(cell[1].strip(" `"), cell[2].strip()): cell[6].strip() for cell in cells}


def test_every_floor_has_to_be_reached() -> None:
    met = line("gentle-code", goals.OURS, 0.1, old_kept=99.0, new_kept=97.0)
    missed = line("gentle-code", goals.OURS, 0.05, old_kept=99.5, new_kept=96.9)
    found = _verdicts([met, missed])
    assert found.pop(("gentle-code", "0.1")) == "met"
    assert found.pop(("gentle-code", "0.05")) == "**missed**"
    assert set(found.values()) == {"not run"}
    assert len(found) == len(goals.GOALS) - 2


def test_every_other_method_has_to_be_passed() -> None:
    ours = line("hard-code", goals.OURS, 0.1, h_mean=80.0)
    denser = line("hard-code", "dare", 0.2, h_mean=99.0)  # is no rival: it may change more
    own = line("hard-code", "exact-asymmetric-refit", 0.1, h_mean=81.0)  # is ours, too
    behind = [ours, denser, own, line("hard-code", "dare", 0.1, h_mean=70.0)]
    assert _verdicts(behind)["hard-code", "0.1"] == "met"
    assert "H-mean 80.0; next is dare, 70.0" in goals.table(behind)
    ahead = [*behind, line("hard-code", "wise-ft", 1.0, h_mean=80.0)]
    assert _verdicts(ahead)["hard-code", "0.1"] == "**missed**"
