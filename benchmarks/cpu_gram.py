"""``gram`` on the CPU against eager torch and a read of the same bytes: ``results/cpu/gram.csv``.

``diag`` is compared with a sum over the words of the inputs, read as int64: the probe. Its ratio is
the share of the probe's bandwidth that it reaches. ``product`` is the matrix product below ``full``
against torch's own: where the extension has none for this CPU the two are one.
"""

import argparse
import math
from pathlib import Path

import torch

from benchmarks.results import CPU, Figure, interleaved, write
from tailor_fast.ops.gram import accumulate_gram_, accumulate_gram_diag_
from tailor_fast.testing import assert_within

FLOORS = {"full": 1.5, "diag": 0.7, "product": 1.5}
_CHECKED = 64  # columns that the gate computes in float64


def check(x: torch.Tensor) -> None:
    """The gate: the first columns against float64."""
    cols = x.shape[1]
    gram = accumulate_gram_(torch.zeros(cols, cols), x, backend="native")
    diag = accumulate_gram_diag_(torch.zeros(cols), x, backend="native")
    part, whole = x[:, :_CHECKED], x
    assert_within(gram[:_CHECKED], part.double().T @ whole.double(), part.float().T @ whole.float())
    assert_within(diag, whole.double().square().sum(0), whole.float().square().sum(0))


def measure(tokens: int, cols: int, rounds: int) -> list[Figure]:
    """Figures of one shape, after the gate on a part of it."""
    from tailor_fast.ops.gemm import has_kernels, product  # which needs the extension

    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    check(x[:, : min(cols, 1024)].contiguous()[:3000])
    left, right = torch.randn(2, cols, cols, generator=torch.Generator().manual_seed(1))
    some = left[:_CHECKED]
    assert_within(product(some, right), some.double() @ right.double(), some @ right)
    products = interleaved(
        {"eager": lambda: left @ right, "native": lambda: product(left, right)}, rounds
    )
    total, diag, words = torch.zeros(cols, cols), torch.zeros(cols), x.view(torch.int64)
    full = interleaved(
        {
            "eager": lambda: total.add_(x.float().T @ x.float()),
            "native": lambda: accumulate_gram_(total, x, backend="native"),
        },
        rounds,
    )
    light = interleaved(
        {
            "probe": words.sum,
            "eager": lambda: diag.add_(x.float().square().sum(0)),
            "native": lambda: accumulate_gram_diag_(diag, x, backend="native"),
        },
        5 * rounds,
    )
    shape = f"[{tokens}, {cols}] bfloat16"
    ratio = products["eager"] / products["native"]
    floor = FLOORS["product"] if has_kernels() else math.nan
    square = f"{cols}x{cols}x{cols} float32"
    figures = [
        Figure("product", square, "eager", products["eager"], 1.0, math.nan),
        Figure("product", square, "native", products["native"], ratio, floor),
    ]
    for work, seconds in (("full", full), ("diag", light)):
        baseline = next(iter(seconds.values()))
        for provider, value in seconds.items():
            floor = FLOORS[work] if provider == "native" else math.nan
            figures.append(Figure(work, shape, provider, value, baseline / value, floor))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CPU / "gram.csv")
    options = parser.parse_args(arguments)
    write(options.out, measure(options.tokens, options.cols, options.rounds))


if __name__ == "__main__":
    main()
