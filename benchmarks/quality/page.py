"""``python -m benchmarks.quality.page`` writes ``docs/quality.md`` and its pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.quality import (
    cells,
    defaults,
    defaults_table,
    goals,
    picture,
    report,
    sequence,
    stitching_table,
    target,
    target_table,
    tried,
    tried_table,
)
from benchmarks.quality.commands import read_cells
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.report import Line, Spread
from benchmarks.quality.rows import ROWS
from benchmarks.results import ROOT

RESULTS = ROOT / "results" / "quality"
PAGE = ROOT.parent / "docs" / "quality.md"
PICTURES = PAGE.parent / "pictures"
DENSITY = 0.1  # of the main table
NAMES = {
    "base": "base model",
    "tuned": "fine-tuned model",
    "wise-ft": "WiSE-FT, best of 10",
    "wise-ft-0.5": "WiSE-FT, 0.5",
    "lines": "LiNeS, best of 11",
    "magnitude": "magnitude",
    "dare": "DARE",
    "ties": "TIES trim",
    "breadcrumbs": "Breadcrumbs",
    "della": "DELLA",
    "wanda": "Wanda on the delta",
    "fisher": "Fisher on the delta",
    "grafting": "Grafting",
    "official": "Model Tailor, the authors' code",
    "mask": "its mask, nothing compensated",
    "obs": "Model Tailor, OBS sweep",
    "default": "**defaults, new data only**",
    "default-retain": "**defaults, with old data**",
    **{
        f"exact-{propagate}{suffix}": f"exact, {propagate}{words}"
        for propagate in ("none", "sequential", "asymmetric")
        for suffix, words in (
            ("", ""),
            ("-retain", ", old data, mask by score"),
            ("-refit", ", old data, refitted mask"),
        )
    },
}


def _spread(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        spread = line.spreads.get(name)
        return "" if spread is None else str(spread)

    return cell


def _mean(name: str, scale: float, digits: int) -> Callable[[Line], str]:
    return lambda line: f"{line.spreads[name].mean / scale:.{digits}f}"


def _peak(line: Line) -> str:
    peak = line.spreads["peak_bytes"].mean
    return "" if peak < 0 else f"{peak / 2**20:.1f}"


COLUMNS: Mapping[str, Callable[[Line], str]] = {
    "method": lambda line: NAMES[line.row],
    "pairs": lambda line: str(line.count),
    "old tasks": _spread("old"),
    "new task": _spread("new"),
    "old kept": _spread("old_kept"),
    "new kept": _spread("new_kept"),
    "H-mean": _spread("h_mean"),
    "mean of tasks": _mean("mean_of_tasks", 1.0, 1),
    "mean of both": _mean("mean_of_old_and_new", 1.0, 1),
    "KB": _mean("patch_bytes", 1e3, 0),
    "s": _mean("cpu_seconds", 1.0, 2),
    "MiB": _peak,
}


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table, the best H-mean in bold."""
    best = max(lines, key=lambda line: line.spreads["h_mean"].mean)
    rows = []
    for line in lines:
        cells = {name: cell(line) for name, cell in COLUMNS.items()}
        if line is best:
            cells["H-mean"] = f"**{cells['H-mean']}**"
        rows.append(f"| {' | '.join(cells.values())} |")
    marks = ["---", *["---:"] * (len(COLUMNS) - 1)]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(marks)} |", *rows])


def densities(lines: Sequence[Line]) -> str:
    """Return H-mean by density as a Markdown table; empty when only one was measured."""
    shares = sorted({line.density for line in lines if ROWS[line.row].has_density})
    if len(shares) < 2:
        return ""
    found = {(line.row, line.density): str(line.spreads["h_mean"]) for line in lines}
    names = [name for name in NAMES if any((name, share) in found for share in shares)]
    rows = [
        f"| {NAMES[name]} | {' | '.join(found.get((name, share), '') for share in shares)} |"
        for name in names
        if ROWS[name].has_density
    ]
    head = f"| H-mean at density | {' | '.join(f'{share:g}' for share in shares)} |"
    return "\n".join([head, f"| --- |{' ---: |' * len(shares)}", *rows])


def _section(protocol: str, lines: Sequence[Line]) -> str:
    main = [
        line
        for line in lines
        if line.row in NAMES and (not ROWS[line.row].has_density or line.density == DENSITY)
    ]
    pairs = max(line.count for line in lines)
    chosen = PROTOCOLS[protocol]
    tuned = chosen.finetuning
    return "\n\n".join(
        part
        for part in (
            f"### {chosen.title}",
            f"`{protocol}`: fine-tuned on `{tuned.task}` for {tuned.steps} steps at"
            f" {tuned.learning_rate:g}, the last {tuned.layers} layers and the projection; {pairs}"
            " pairs of models at most, *pairs* says how many each row has.",
            table(main),
            f"![Old tasks against the new one](pictures/quality-{protocol}.png)",
            densities(lines),
        )
        if part
    )


def _sequence(path: Path) -> str:
    found = sequence.load(path)
    seeds = sorted({one.seed for one in found})
    rows = []
    for arm in sequence.ARMS:
        each = [sequence.figures(found, arm, seed) for seed in seeds]
        cells = [
            str(Spread.of([figures[name] for figures in each]))
            for name in ("old", "average", "transfer")
        ]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    tasks = ", ".join(f"`{stage.task}`" for stage in sequence.STAGES)
    return "\n\n".join(
        (
            "### Four tasks in turn",
            f"The LLaVA of the hard protocols learns {tasks} one after the other, by fine-tuning"
            " alone, or repaired after each (density 0.1, defaults, old data of every task so"
            " far). Accuracies after the last; backward transfer is the mean change of a new"
            f" task since it was learned. {len(seeds)} fine-tuning"
            f" {'seed' if len(seeds) == 1 else 'seeds'}; `python -m benchmarks.quality.sequence`.",
            "\n".join(
                [
                    "| | old tasks | average of new tasks | backward transfer |",
                    "| --- | ---: | ---: | ---: |",
                    *rows,
                ]
            ),
        )
    )


def _defaults(path: Path) -> str:
    if not path.exists():
        return "Not measured yet."
    cells = read_cells(path)
    return "\n\n".join(
        f"### {title}\n\n{defaults_table.table(cells, retain)}"
        for title, retain in (("With old data", True), ("New data only", False))
    )


def _target(path: Path) -> str:
    return target_table.table(list(cells.read(path))) if path.exists() else "Not measured yet."


def _tried(path: Path) -> tuple[str, str]:
    if not path.exists():
        return ("Not measured yet.",) * 2
    found = read_cells(path)
    return tried_table.table(found), tried_table.factors(found)


def render(folder: Path = RESULTS) -> str:
    """Return the page; a protocol that was not measured is left out."""
    lines = report.summarise(report.measured(folder))
    sections = [
        _section(protocol, [line for line in lines if line.protocol == protocol])
        for protocol in dict.fromkeys(line.protocol for line in lines)
    ]
    if (folder / sequence.OUT.name).exists():
        sections.append(_sequence(folder / sequence.OUT.name))
    sections += stitching_table.sections(folder)
    template = Path(__file__).with_name("page.template.md").read_text(encoding="utf-8")
    told = template.replace("{sections}", "\n\n".join(sections))
    told = told.replace("{defaults}", _defaults(folder / defaults.OUT.name))
    told = told.replace("{target}", _target(folder / target.OUT.name))
    attempts, factors = _tried(folder / tried.OUT.name)
    told = told.replace("{tried}", attempts).replace("{factors}", factors)
    return told.replace("{goals}", goals.table(lines))


def main() -> None:
    """Write the page and draw its pictures."""
    PICTURES.mkdir(exist_ok=True)
    lines = report.summarise(report.measured(RESULTS))
    for protocol in dict.fromkeys(line.protocol for line in lines):
        path = PICTURES / f"quality-{protocol}.png"
        picture.trade_off([line for line in lines if line.protocol == protocol], path)
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
