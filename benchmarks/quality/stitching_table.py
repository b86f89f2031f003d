"""The pages' sections about several fine-tunes in one model."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import stitching
from benchmarks.quality.report import Spread

NAMES = {
    "base": "base model",
    "tuned-code": "fine-tuned on `code`",
    "tuned-next": "fine-tuned on `next`",
    "tuned-twice": "fine-tuned on `twice`",
    "tuned-mirror": "fine-tuned on `mirror`",
    "task-arithmetic": "task arithmetic",
    "magmax": "MagMax",
    "ties": "TIES",
    "dare-ties": "DARE-TIES",
    "pcb": "PCB",
    "patches-mean": "mean of the patches",
    "patches-sum": "sum of the patches",
    "patches-mean-retain": "mean of the patches, old data",
    "patches-sum-retain": "sum of the patches, old data",
    "surrogate": "surrogate: joint solve of the patches",
    "surrogate-retain": "surrogate, old data",
    "surrogate-refit-retain": "surrogate, old data, refitted mask",
    "joint-union": "**joint solve, union**",
    "joint-best": "joint solve, best",
    "joint-union-retain": "joint solve, union, old data, mask by score",
    "joint-best-retain": "joint solve, best, old data, mask by score",
    "refit-union-retain": "**joint solve, union, old data, refitted mask**",
    "refit-best-retain": "joint solve, best, old data, refitted mask",
}


def sections(folder: Path) -> list[str]:
    """What was measured, two fine-tunes and four, each as Markdown."""
    found = []
    for group, made in stitching.OUT.items():
        path = folder / made.name
        if path.exists():
            lines = stitching.load(path)
            template = Path(__file__).with_name(f"stitching-{group}.template.md")
            seeds = str(len({line.seed for line in lines}))
            told = template.read_text(encoding="utf-8").strip().replace("{seeds}", seeds)
            found.append(told.replace("{table}", table(lines)))
    return found


def table(lines: Sequence[stitching.Line]) -> str:
    """Return one row a method; where it has fewer seeds than the base model, it says so."""
    columns = {
        "old tasks": "old",
        "old kept": "kept",
        **{f"`{task}`": task for task in stitching.new_tasks(lines[0].scores)},
        "mean of new": "new",
        "mean of tasks": "mean",
        "changed, %": "changed",
    }
    head = ["method", *columns, "at 0.05: mean of tasks", "chosen for H-mean: H-mean"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    seeds = {name: len({line.seed for line in lines if line.row == name}) for name in NAMES}
    for name, words in NAMES.items():
        if not seeds[name]:
            continue
        few = f" ({seeds[name]} of {seeds['base']} seeds)" if seeds[name] < seeds["base"] else ""
        text = str if seeds[name] > 1 else _of_one
        held = stitching.spreads(lines, name, 0.0, "held")
        sparse = stitching.spreads(lines, name, 0.05, "held")
        harmonic = stitching.spreads(lines, name, 0.0, "h_mean")["h_mean"]
        rows.append(
            [
                words + few,
                *(text(held[figure]) for figure in columns.values()),
                text(sparse["mean"]) if sparse else "",
                text(harmonic),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of_one(spread: Spread) -> str:
    return f"{spread.mean:.1f}"  # one value has no deviation
