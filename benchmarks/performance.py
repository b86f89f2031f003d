"""``python -m benchmarks.performance`` writes ``docs/performance.md`` from the results."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import CPU, ROOT

PAGE = ROOT.parent / "docs" / "performance.md"
Cell = Callable[[Mapping[str, str]], str]

_HEAD = """# Performance

Written by `python -m benchmarks.performance` from the tables in `benchmarks/results`, which the
commands below made. Every figure is a median of interleaved rounds in one run on one machine, after
a check that the answer is right; these machines are shared, so compare ratios, and only within a
table. What misses its bar is shown missing it.

No GPU figure exists yet. The Triton kernels pass under the interpreter and compile for sm_80 and
sm_90 without spills; `benchmarks/gpu.sh` measures them on a card.

On your machine: `tailor-fast bench`.
"""


class Table(NamedTuple):
    """One table of the page.

    Attributes:
        file: in ``results/cpu``.
        title: its heading.
        text: what it shows, and by which command.
        columns: heading and content of each column.
    """

    file: str
    title: str
    text: str
    columns: Mapping[str, Cell]


def _plain(name: str) -> Cell:
    return lambda row: row[name]


def _seconds(row: Mapping[str, str]) -> str:
    value = float(row["seconds"])
    if value == 0:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _number(name: str, unit: str = "", digits: int = 3) -> Cell:
    def cell(row: Mapping[str, str]) -> str:
        text = row[name]
        return "" if text in ("", "nan") else f"{float(text):.{digits}g}{unit}"

    return cell


_NUMBERS = ("time", "ratio", "GB/s", "GB from disk", "peak MiB")
_OP: Mapping[str, Cell] = {
    "work": _plain("work"),
    "shape": _plain("shape"),
    "by": _plain("provider"),
    "time": _seconds,
    "ratio": _number("ratio"),
    "bar": _number("floor"),
}
TABLES = (
    Table(
        "decorate.csv",
        "Decorating one layer",
        "90% reverted, Gram given; the ratio is to the authors' algorithm in eager torch, that of"
        " `exact skewed` to the even case, that of `exact loss` is the layer's error behind"
        " the sweep to that behind the exact solve. `exact skewed` misses its bar: three quarters"
        " of its solve go to the 15% of rows that keep more than a quarter of the columns and take"
        " 30 to 70"
        " iterations. About half of the solve is iterations; gathering and float64 residuals take a"
        " third. Tried: matrices of 16 bits for the iterations, proof included, shorten the solve"
        " by 17%, not enough; prefetching and one stream instead of four gained nothing beyond"
        " noise; a closer bound of the minimum cannot end those rows earlier, for theirs is on"
        " average within 15% of it; the objective itself as the floor of the proof takes a tenth"
        " off both cases, and makes a row depend on the rounding of a GEMM; the lowest eigenvalue"
        " of the whole matrix is 1.05 times the one that is assumed, so a factor of it would prove"
        " no row sooner. By its count of operations a Cholesky factor per row would take longer,"
        " and masked products with the whole Gram would gain a tenth."
        " `python -m benchmarks.cpu_decorate`",
        _OP,
    ),
    Table(
        "class.csv",
        "The authors' class",
        "`SparseGPT` in mode `official` against the same steps of the authors in eager torch."
        " `python -m benchmarks.cpu_class`",
        _OP,
    ),
    Table(
        "gram.csv",
        "Grams",
        "The ratio is to `x.float().T @ x.float()` added in place; for the diagonal it is the share"
        " of a read of the same bytes, for `product`, the GEMM below, it is to torch's. `python -m"
        " benchmarks.cpu_gram`",
        _OP,
    ),
    Table(
        "select.csv",
        "Selecting a patch",
        "45 million pairs, one unit of scope. `reused` writes into a mask whose pages exist"
        " already; clearing the 45 MB of a new one takes the system 2 ms, of which no kernel saves"
        " anything. Bars: 0.60 of the probe by salience, 0.25 fused (`row_block`). `python -m"
        " benchmarks.cpu_select`",
        {
            "way": lambda row: row["way"].replace("_", " "),
            "shape": _plain("shape"),
            "time": _seconds,
            "GB/s": _number("gb_per_s"),
            "share of the probe": _number("share_of_probe"),
        },
    ),
    Table(
        "codec.csv",
        "Patches in memory",
        "One core, 45 million weights; GB/s of the tensor's own bytes, the ratio is to copying it."
        " Bar of `apply`: 3 GB/s. `python -m benchmarks.cpu_codec`",
        {
            "work": _plain("work"),
            "shape": _plain("shape"),
            "by": _plain("provider"),
            "time": _seconds,
            "GB/s": _number("gb_per_s"),
            "ratio": _number("ratio"),
            "bar": _number("bar"),
        },
    ),
    Table(
        "disk.csv",
        "From disk to disk",
        "Patching without data at density 0.1 by the command line, start of the program included."
        " `python -m benchmarks.cpu_disk DIR`",
        {
            "size": _plain("size"),
            "inputs": _plain("inputs"),
            "work": _plain("work"),
            "time": _seconds,
            "peak MiB": _number("peak_mib", digits=4),
            "ratio": _number("ratio"),
            "bar": _plain("bar"),
        },
    ),
    Table(
        "lora.csv",
        "An adapter as TUNED",
        "Patching without data towards an adapter of every linear of the blocks, and towards the"
        " checkpoint that it makes when it is merged; warm, start of the program included. The"
        " outputs are one another's but for a rounding. `python -m benchmarks.cpu_lora DIR`",
        _OP,
    ),
    Table(
        "patchfile.csv",
        "Patch files",
        "Caches dropped, output made durable; the ratio is to `dd` of the same bytes. `python -m"
        " benchmarks.cpu_patchfile`",
        _OP,
    ),
    Table(
        "batch.csv",
        "Many models",
        "Eight models on one base of 0.8 GB, without data, by one `batch`, by one whose `max_ram`"
        " has no room to keep the base, and by eight programs; with a page cache that keeps"
        " nothing, as where models are larger than the memory, too. `python -m benchmarks.cpu_batch"
        " DIR`",
        {**_OP, "GB from disk": _number("gb_from_disk")},
    ),
    Table(
        "stitch.csv",
        "Two fine-tunes in one model",
        "Two fine-tunes of one base, statistics of each taken before, at density 0.05 a task: two"
        " patches, one after the other, that leave two models, and the joint solve that leaves"
        " one; the mask from the score, or, with old data, from the solution in four steps. The"
        " ratio is to the two patches. `python -m benchmarks.cpu_stitch DIR`",
        {**_OP, "peak MiB": _number("peak_mib", digits=4)},
    ),
    Table(
        "calibration.csv",
        "Calibration beside plain forward passes",
        "Both streams of an asymmetric run, walked group by group; the ratio is that of plain"
        " passes to the walk without its moments, which stand apart. `python -m"
        " benchmarks.cpu_calibration`",
        _OP,
    ),
    Table(
        "processes.csv",
        "Many processes",
        "`exact`, asymmetric, from disk to disk, one thread each. `patch` is the job without the"
        " start of the programs, that of transformers included; `program` has it. The bar is"
        " missed: `exchange`, which the stages contain, is for the most part a process waiting for"
        " the other at the three places of each input group where both must meet; each process"
        " factors every Gram, chooses every mask and reads every weight itself; finding the input"
        " groups and what is not patched is not shared. `python -m benchmarks.cpu_processes DIR`",
        _OP,
    ),
    Table(
        "stages.csv",
        "A patch of a 1.1B model, stage by stage",
        "TinyLlama's shape, 16384 tokens, `exact`, asymmetric, from disk to disk. CPU seconds are"
        " those of all threads: the machine was shared, the run stopped while others were timed."
        " `python -m benchmarks.cpu_stages DIR`",
        {
            "stage": _plain("work"),
            "work": _plain("shape"),
            "time": _seconds,
            "CPU s": _number("cpu_seconds"),
            "share": _number("ratio"),
            "max_ram, GiB": _number("max_ram_gib"),
            "peak, GiB": _number("peak_gib"),
        },
    ),
)


def render(folder: Path = CPU) -> str:
    """The whole page; a table that was not made yet is left out."""
    parts = [_HEAD, "## On the CPU\n"]
    for table in TABLES:
        path = folder / table.file
        if path.is_file():
            parts.append(_section(table, path))
    return "\n".join(parts)


def _section(table: Table, path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [[cell(row).replace("|", "\\|") for cell in table.columns.values()] for row in rows]
    marks = ["---:" if name in _NUMBERS else "---" for name in table.columns]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (list(table.columns), marks, *lines))
    last = rows[-1]
    where = f"{last['machine']}, {last['threads']} threads, torch {last['torch']}"
    made = f"Commit {last['commit']}, {last['date'][:10]}; {where}."
    return f"### {table.title}\n\n{table.text}.\n\n{body}\n\n{made}\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
