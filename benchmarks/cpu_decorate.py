"""``decorate`` on the CPU against the authors' algorithm: ``results/cpu/decorate.csv``.

One square layer, 90% reverted, one run, all calls in turn. ``exact skewed`` has rows of very
different size, so that some keep half of their columns; its ratio is to ``exact`` on even rows.
``exact loss`` is what the layer's output error behind the ``obs`` sweep is to that behind the exact
solve, on the same mask of the gate's layer. (By the damped objective, which the solve minimises,
the two are a hundredth closer.)
"""

import argparse
import math
import time
from pathlib import Path

import torch

from benchmarks.authors import AuthorsOptions, authors_fasterprune
from benchmarks.bench_decorate import PERCDAMP, SPARSITY, Layer, check_masked, check_official, layer
from benchmarks.results import CPU, Figure, interleaved, write
from tailor_fast.ops.decorate import decorate_exact, decorate_obs, decorate_official

FLOORS = {"official": 6.0, "obs": 8.0, "exact": 5.0, "exact skewed": 0.5}
LOSS_FLOOR = 1 / 0.6  # of the sweep's output error to the exact solve's
_SKEW = 0.7  # standard deviation of the logarithm of the rows' sizes


def skewed(problem: Layer) -> Layer:
    """The same layer with rows of lognormal size, and the mask of the largest deltas."""
    generator = torch.Generator().manual_seed(4)
    scale = (_SKEW * torch.randn(len(problem.base), 1, generator=generator)).exp()
    delta = problem.delta * scale
    kept = delta.abs().flatten().topk(int((1 - SPARSITY) * delta.numel())).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept] = True
    return Layer(problem.base, problem.base + delta, problem.gram, mask.view_as(delta))


def loss_figure(problem: Layer) -> Figure:
    """How much better the exact solve answers than the sweep, on one mask."""
    mask, gram = problem.mask, problem.gram

    def error(patch: torch.Tensor) -> float:
        left = (problem.delta - patch).double()
        return float((left @ gram.double()).mul_(left).sum())

    start = time.perf_counter()
    exact = decorate_exact(problem.delta, mask, gram, percdamp=PERCDAMP, backend="native")
    seconds = time.perf_counter() - start
    obs = decorate_obs(problem.delta, mask, gram, percdamp=PERCDAMP, backend="native")
    shape = f"{len(mask)}x{len(mask)} float32"
    return Figure(
        "exact loss", shape, "native", seconds, error(obs.patch) / error(exact.patch), LOSS_FLOOR
    )


def measure(size: int, rounds: int) -> list[Figure]:
    """Figures of one size, after the correctness gate."""
    even = layer(size)
    uneven = skewed(even)
    gate = layer(min(size, 512))
    check_official(gate, "native")
    for problem in (gate, skewed(gate)):
        for mode in ("obs", "exact"):
            check_masked(mode, problem, "native")
    check_masked("exact", even, "native")
    delta, uneven_delta = even.delta, uneven.delta
    base, tuned, gram, mask = even
    options = AuthorsOptions(sparsity=SPARSITY, percdamp=PERCDAMP)
    seconds = interleaved(
        {
            "authors": lambda: authors_fasterprune(base, tuned, gram, options),
            "official": lambda: decorate_official(
                base, tuned, gram, sparsity=SPARSITY, backend="native"
            ),
            "obs": lambda: decorate_obs(delta, mask, gram, percdamp=PERCDAMP, backend="native"),
            "exact": lambda: decorate_exact(delta, mask, gram, percdamp=PERCDAMP, backend="native"),
            "exact skewed": lambda: decorate_exact(
                uneven_delta, uneven.mask, gram, percdamp=PERCDAMP, backend="native"
            ),
        },
        rounds,
    )
    shape = f"{size}x{size} float32"
    figures = [Figure("authors", shape, "authors", seconds["authors"], 1.0, math.nan)]
    for work, floor in FLOORS.items():
        baseline = seconds["exact" if work == "exact skewed" else "authors"]
        figures.append(
            Figure(work, shape, "native", seconds[work], baseline / seconds[work], floor)
        )
    return [*figures, loss_figure(gate)]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CPU / "decorate.csv")
    options = parser.parse_args(arguments)
    write(options.out, measure(options.size, options.rounds))


if __name__ == "__main__":
    main()
