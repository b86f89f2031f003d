"""``codec`` on one core: ``results/cpu/codec.csv``.

Encoding reads a pair, applying changes one tensor in place; both stand beside a copy of that
tensor. ``gb_per_s`` counts the tensor's own bytes, ``bar`` is the least of it that is asked for.
"""

import argparse
import math
from pathlib import Path

import torch

from benchmarks.bench_codec import checked_patch
from benchmarks.results import CPU, Figure, interleaved, write
from tailor_fast.ops.codec import apply_patch_, encode_patch

DENSITIES = (0.01, 0.1, 0.5)
BARS = {"copy": math.nan, "encode": math.nan, "apply": 3.0}  # GB/s of a core


def make_pair(size: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bfloat16 weights, and the same with a share of them moved by half."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator).bfloat16()
    moved = torch.rand(size, generator=generator) < density
    return base, torch.where(moved, base * 1.5, base)


def measure(size: int, density: float, rounds: int) -> list[Figure]:
    """Figures of one density, after the correctness gate."""
    base, tuned = make_pair(size, density)
    patch = checked_patch(base, tuned, "native")
    target = base.clone()
    seconds = interleaved(
        {
            "copy": lambda: target.copy_(tuned),
            "encode": lambda: encode_patch(base, tuned, backend="native"),
            "apply": lambda: apply_patch_(target, patch, backend="native"),
        },
        rounds,
    )
    shape = f"{size} bfloat16, density {density}"
    return [
        Figure(
            work,
            shape,
            "torch" if work == "copy" else "native",
            taken,
            seconds["copy"] / taken,
            math.nan,
        )
        for work, taken in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096 * 11008)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=CPU / "codec.csv")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = [
            figure
            for density in DENSITIES
            for figure in measure(options.size, density, options.rounds)
        ]
        rates = [2 * options.size / figure.seconds / 1e9 for figure in figures]
        bars = [BARS[figure.work] for figure in figures]
        write(options.out, figures, {"gb_per_s": rates, "bar": bars})
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
