"""The drop-in class against the authors' algorithm: ``results/cpu/class.csv``.

``SparseGPT`` in mode ``official``, as a script uses it: a new object, ``add_batch`` for each batch,
``fasterprune(0.9)``; beside it the same steps of the authors in eager torch. One square layer in
float32, four batches of correlated inputs, twice as many tokens as columns in all.
"""

import argparse
import contextlib
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from benchmarks.authors import AuthorsOptions, authors_fasterprune, authors_gram
from benchmarks.bench_decorate import MOVED, PERCDAMP, SPARSITY
from benchmarks.results import CPU, Figure, write
from tailor_fast.integrations.sparsegpt import SparseGPT

SIZES = (2048, 4096)
FLOOR = 6.0
_BATCHES = 4
_OPTIONS = AuthorsOptions(sparsity=SPARSITY, percdamp=PERCDAMP)
T = TypeVar("T")
Pair = tuple[torch.Tensor, torch.Tensor]


def problem(size: int) -> tuple[Pair, list[torch.Tensor]]:
    """Base and tuned weight, and inputs ``x = z A^T + 0.3 eps``, a batch of one sequence each."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = normal(size, size // 4)
    tokens = 2 * size // _BATCHES
    batches = [
        (normal(tokens, size // 4) @ mixing.T + 0.3 * normal(tokens, size))[None]
        for _ in range(_BATCHES)
    ]
    base = 0.02 * normal(size, size)
    return (base, base + 0.002 * normal(size, size)), batches


def linear(weight: torch.Tensor) -> nn.Linear:
    """A layer with a weight of its own."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


class Timed:
    """Seconds of the two steps, round by round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"add_batch": [], "fasterprune": []}

    def step(self, name: str, call: Callable[[], T]) -> T:
        """Time one call."""
        start = time.perf_counter()
        found = call()
        self.seconds[name].append(time.perf_counter() - start)
        return found

    def medians(self) -> dict[str, float]:
        """Of the steps, and of both in one round."""
        both = [sum(pair) for pair in zip(*self.seconds.values(), strict=True)]
        found = {name: statistics.median(values) for name, values in self.seconds.items()}
        return {**found, "both": statistics.median(both)}


def authors(pair: Pair, batches: list[torch.Tensor], timed: Timed) -> torch.Tensor:
    """The authors' steps."""
    gram = timed.step("add_batch", lambda: authors_gram(batches))
    base, tuned = pair
    return timed.step("fasterprune", lambda: authors_fasterprune(base, tuned, gram, _OPTIONS)[0])


def ours(pair: Pair, batches: list[torch.Tensor], timed: Timed) -> torch.Tensor:
    """The same by the class."""
    base, tuned = (linear(weight) for weight in pair)

    def collected() -> SparseGPT:
        gpt = SparseGPT(tuned, base)
        for batch in batches:
            gpt.add_batch(batch, batch)
        return gpt

    gpt = timed.step("add_batch", collected)
    with contextlib.redirect_stdout(io.StringIO()):
        timed.step("fasterprune", lambda: gpt.fasterprune(SPARSITY, percdamp=PERCDAMP))
    gpt.free()
    return tuned.weight.data


def check(base: torch.Tensor, expected: torch.Tensor, got: torch.Tensor) -> None:
    """Refuse to time what keeps other weights than the authors do."""
    moved = ((expected != base) != (got != base)).float().mean().item()
    if moved > MOVED:
        raise SystemExit(f"{moved:.1e} of the weights are kept by one of the two alone")


def measure(size: int, rounds: int) -> list[Figure]:
    """Figures of one size; the two take turns."""
    pair, batches = problem(size)
    timed = {"authors": Timed(), "class": Timed()}
    for _ in range(rounds):
        expected = authors(pair, batches, timed["authors"])
        check(pair[0], expected, ours(pair, batches, timed["class"]))
    theirs, found = timed["authors"].medians(), timed["class"].medians()
    shape, figures = f"{size}x{size} float32, {2 * size} tokens", []
    for step, seconds in found.items():
        floor = FLOOR if step == "fasterprune" else math.nan
        figures += [
            Figure(step, shape, "authors", theirs[step], 1.0, math.nan),
            Figure(step, shape, "class", seconds, theirs[step] / seconds, floor),
        ]
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CPU / "class.csv")
    options = parser.parse_args(arguments)
    figures = [figure for size in options.sizes for figure in measure(size, options.rounds)]
    write(options.out, figures)


if __name__ == "__main__":
    main()
