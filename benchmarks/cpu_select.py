"""``select`` on the CPU beside its bars: eager torch, and a read-only probe of the same bytes.

    python -m benchmarks.cpu_select [--rows 4096 --cols 11008 --rounds 7 --output FILE.csv]

The ways are timed in turn within a round, so that a busy machine slows all of them, and medians are
compared. A gate runs first: the masks of the library equal those of its reference, and the
baselines keep as many, the authors' way but for ties at its threshold. One row per way: seconds,
gigabytes of the pair per second, and the ratio to ``select_patch`` (probe: select's share of it).

A call returns a new mask, whose memory the system clears page by page as it is first written. The
ways named ``reused`` write the same mask each time: what selection itself takes.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench_select import _by_sort, _by_topk, _scores
from tailor_fast import _C
from tailor_fast._version import __version__
from tailor_fast.ops.select import kept_count, native, select_patch
from tailor_fast.ops.select.options import Scoring

DENSITY = 0.1
OUTPUT = Path(__file__).parent / "results" / "cpu" / "select.csv"
Way = Callable[[], object]


def make_pair(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bfloat16 pair as fine-tuning leaves it, and a column weight of wide spread."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(rows, cols, generator=generator) * 0.02
    tuned = base + torch.randn(rows, cols, generator=generator) * 0.002
    return base.bfloat16(), tuned.bfloat16(), torch.randn(cols, generator=generator).exp()


def ways(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> dict[str, Way]:
    """What is timed, by name."""
    k = kept_count(base.numel(), DENSITY)
    words, threads = base.numel() * base.element_size() // 8, torch.get_num_threads()
    addresses = [base.data_ptr(), tuned.data_ptr()]
    salience = {"salience_weight": 1.0, "normalize": "none"}
    mask = torch.zeros(base.shape, dtype=torch.bool)

    def reused(scoring: Scoring) -> Way:
        pair = native._describe(base, tuned, c, scoring)
        return lambda: native._run(pair, mask, tuple(base.shape), (k, k), native.Tuning())  # type: ignore[arg-type]  # two sizes

    return {
        "read_probe": lambda: _C.read_probe(addresses, words, threads),
        "select_salience": lambda: select_patch(base, tuned, density=DENSITY, **salience),  # type: ignore[arg-type]  # options from a dict
        "select_row_block": lambda: select_patch(base, tuned, c, density=DENSITY),
        "select_salience_reused": reused(Scoring("obs", 1.0, "none")),
        "select_row_block_reused": reused(Scoring("obs", 0.5, "row_block")),
        "torch_sort": lambda: _by_sort(_scores(base.float(), tuned.float(), c), k),
        "torch_topk": lambda: _by_topk(_scores(base.float(), tuned.float(), c), k),
    }


def check(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> None:
    """Refuse to time masks that differ from the reference."""
    for options in ({}, {"salience_weight": 1.0, "normalize": "none"}):
        masks = [
            select_patch(base, tuned, c, density=DENSITY, backend=name, **options)  # type: ignore[arg-type]  # options from a dict
            for name in ("native", "reference")
        ]
        if not torch.equal(*masks):
            raise AssertionError(f"native and reference differ with {options}")


def measure(todo: dict[str, Way], rounds: int, slow_rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds; the baselines, seconds each, take part in fewer."""
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for i in range(rounds + 1):
        for name, way in todo.items():
            if name.startswith("torch") and i > slow_rounds:
                continue
            start = time.perf_counter()
            way()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def describe() -> dict[str, object]:
    """Facts that a figure means nothing without."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    root = Path(__file__).parent
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "commit": commit.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "tailor_fast": __version__,
        "torch": torch.__version__,
        "machine": cpu,
        "instructions": _C.instruction_sets()[-1],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Check, measure, write, print."""
    parser = argparse.ArgumentParser(description="Times select on the CPU.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=11008)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    pair = make_pair(given.rows, given.cols)
    check(*pair)
    seconds = measure(ways(*pair), given.rounds, given.slow_rounds)
    gigabytes = 2 * pair[0].numel() * pair[0].element_size() / 1e9
    facts = describe() | {"shape": f"{given.rows}x{given.cols} bfloat16"}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="") as file:
        columns = ["way", "seconds", "gb_per_s", "vs_row_block", "share_of_probe", *facts]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, time_taken in seconds.items():
            row: dict[str, object] = {
                "way": name,
                "seconds": f"{time_taken:.5f}",
                "gb_per_s": f"{gigabytes / time_taken:.2f}",
                "vs_row_block": f"{time_taken / seconds['select_row_block']:.2f}",
                "share_of_probe": f"{seconds['read_probe'] / time_taken:.3f}",
            }
            writer.writerow(row | facts)
            print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
