"""``gram`` against eager torch: ``gram += x.float().T @ x.float()`` and its relatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.timing import DEVICE, measure
from tailor_fast.ops import backends
from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)
from tailor_fast.testing import assert_within

BACKENDS = [name for name, reason in backends()["gram"][DEVICE].items() if reason is None]
PROVIDERS = [*BACKENDS, "eager"]
SHAPES = [(2048, 1024), (512, 4096)] if DEVICE == "cpu" else [(2048, 4096), (2048, 11008)]
DTYPES = {"full": ["bfloat16", "float32"], "cross": ["bfloat16"], "diag": ["bfloat16", "float32"]}
CASES = [(work, *shape, dtype) for work in DTYPES for shape in SHAPES for dtype in DTYPES[work]]
CHECKED = 64  # columns that the gate computes in float64

Step = Callable[[torch.Tensor, torch.Tensor], object]


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns of very different sizes, as a layer's inputs have them."""
    torch.manual_seed(0)
    scale = torch.logspace(-2, 1, cols, device=DEVICE)
    return (torch.randn(tokens, cols, device=DEVICE) * scale).to(dtype)


def steps(provider: str) -> dict[str, Step]:
    """What one provider does per batch of tokens, by name of the work."""
    if provider == "eager":
        return {
            "full": lambda total, x: total.add_(x.float().T @ x.float()),
            "cross": lambda total, x: total.add_(x.float().T @ x.flip(0).float()),
            "diag": lambda total, x: total.add_(x.float().square().sum(0)),
        }
    name: Any = provider
    return {
        "full": lambda total, x: accumulate_gram_(total, x, backend=name),
        "cross": lambda total, x: accumulate_cross_gram_(total, x, x.flip(0), backend=name),
        "diag": lambda total, x: accumulate_gram_diag_(total, x, backend=name),
    }


def check(work: str, step: Step, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """The gate: the first columns against float64."""
    got = torch.zeros(shape, device=DEVICE)
    step(got, x)
    left, right = x[:, :CHECKED], x.flip(0) if work == "cross" else x
    if work == "diag":
        expected, plain = x.double().square().sum(0), x.float().square().sum(0)
    else:
        expected, plain = left.double().T @ right.double(), left.float().T @ right.float()
        got = got[:CHECKED]
    assert_within(got, expected, plain)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("work", "tokens", "cols", "dtype"), CASES)
def test_accumulate(
    benchmark: Any, work: str, tokens: int, cols: int, dtype: str, provider: str
) -> None:
    """One batch of tokens; operations of the full product per second, bytes of x for diag."""
    x = inputs(tokens, cols, getattr(torch, dtype))
    shape = (cols,) if work == "diag" else (cols, cols)
    step = steps(provider)[work]
    check(work, step, x, shape)
    total = torch.zeros(shape, device=DEVICE)
    count = x.nbytes if work == "diag" else 2 * tokens * cols * cols
    measure(benchmark, f"{work} [{tokens}, {cols}] {dtype}", lambda: step(total, x), count)
