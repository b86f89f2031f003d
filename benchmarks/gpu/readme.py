"""``python -m benchmarks.gpu.readme`` writes ``benchmarks/README.md``; a test holds it to this.

The text stands in ``readme.template.md``, floors are computed from the costs in ``floors``, and
measured times come from ``results/<card>/*.csv``.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import plan
from benchmarks.gpu.floors import CARDS, Cost
from benchmarks.gpu.plan import MODEL_7B, NOMINAL_ITERATIONS, TOKENS, Bar
from benchmarks.results import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "results"
NOT_MEASURED = "not measured yet"
OURS = ("triton", "cuda", "patch_checkpoint")

TEMPLATE = Path(__file__).with_name("readme.template.md")


class Line(NamedTuple):
    """One row of a table of floors."""

    work: str
    shape: str
    cost: Cost
    bars: tuple[Bar, ...]


def kernel_lines() -> list[Line]:
    """The ops at the shapes of a 7B model."""
    model = MODEL_7B
    entries = [plan.streamed(model, model.layers, kind) for kind in ("none", "row_block")]
    entries += plan.kernel_entries(model, TOKENS)
    return [
        Line(entry.work, f"{entry.shape} {entry.dtype}", entry.cost, entry.bars)
        for entry in entries
    ]


def block_lines() -> list[Line]:
    """The parts of one block."""
    model, bars = MODEL_7B, plan.BLOCK_BARS
    shape = f"{model.name} block"
    return [
        Line("exact", shape, plan.block_cost(model, "exact"), bars["exact"]),
        Line("obs sweep", shape, plan.block_cost(model, "obs"), bars["obs sweep"]),
        Line("obs factor", shape, plan.factor_cost(model), ()),
    ]


def render(results: Path = RESULTS) -> str:
    """The whole file."""
    rates = "; ".join(
        f"{card.name} {card.copy / 1e12:.1f} TB/s, {card.bf16 / 1e12:.0f} TFLOP/s bfloat16,"
        f" {card.tf32 / 1e12:.0f} TF32, {card.fp32 / 1e12:.0f} float32"
        for card in CARDS
    )
    found = {part: read(results, part) for part in ("kernels", "block", "e2e")}
    return TEMPLATE.read_text(encoding="utf-8").format(
        rates=rates,
        kernels=_table(kernel_lines(), found["kernels"]),
        block=_table(block_lines(), found["block"]),
        iterations=NOMINAL_ITERATIONS,
        data=plan.DATA,
        bars=", ".join(map(str, plan.END_TO_END_BARS)),
        whole=_whole(found["e2e"]),
    )


Tables = dict[str, list[dict[str, str]]]  # card -> rows


def read(results: Path, part: str) -> Tables:
    """Rows of one part by card; only runs on a card stand under ``results``."""
    tables: Tables = {}
    for path in sorted(results.glob(f"*/{part}.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            tables.setdefault(row["card"], []).append(row)
    return tables


def _table(lines: Sequence[Line], tables: Tables) -> str:
    cards = list(tables) or ["measured"]
    head = ["work", "shape", "bytes", "operations", *(f"floor, {c.name}" for c in CARDS)]
    body = []
    for line in lines:
        operations = f"{line.cost.flops:.3g} {line.cost.unit}" if line.cost.flops else ""
        floors = [_seconds(card.floor(line.cost)) for card in CARDS]
        measured = [_measured(line, tables.get(card, [])) for card in cards]
        bars = ", ".join(map(str, line.bars))
        moved = f"{line.cost.bytes:.3g}"
        body.append([line.work, line.shape, moved, operations, *floors, bars, *measured])
    return _markdown([*head, "bar", *cards], body)


def _measured(line: Line, rows: Iterable[dict[str, str]]) -> str:
    for row in rows:
        shape = f"{row['shape']} {row['dtype']}"
        here = row["work"] == line.work and line.shape in (shape, row["shape"])
        baseline = row["provider"] not in OURS
        if not here or baseline or not row["seconds"]:
            continue
        facts = [_seconds(float(row["seconds"]))]
        if row["share"]:
            facts.append(f"{float(row['share']):.0%} of floor")
        if row["ratio"]:
            facts.append(f"{float(row['ratio']):.3g}x")
        return ", ".join(facts)
    return NOT_MEASURED


def _whole(tables: Tables) -> str:
    body = [
        [
            card,
            row["work"],
            row["shape"],
            _seconds(float(row["seconds"])),
            f"{float(row['ratio']):.3g}x" if row["ratio"] else "",
            f"{int(row['peak_bytes'] or 0) / 2**30:.2f} GiB",
            row["note"],
        ]
        for card, rows in tables.items()
        for row in rows
        if row["work"].startswith("patch ") and row["seconds"]
    ]
    if not body:
        return f"The whole job was {NOT_MEASURED} on a GPU."
    head = ["card", "job", "shape", "time", "times the authors'", "peak GPU memory", "notes"]
    return _markdown(head, body)


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    README.write_text(render(), encoding="utf-8")
