"""How the op benchmarks time: the same rounds, the same facts beside the figures."""

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(benchmark: Any, group: str, function: Callable[[], object], work: int) -> None:
    """Time a call that allocates and computes as a user's would.

    Args:
        benchmark: the fixture of pytest-benchmark.
        group: what is computed; the rows of one group do the same work.
        function: the call, its inputs bound; it may change them if every call does the same work.
        work: bytes or floating-point operations that the figure ``per_second`` counts.
    """

    def call() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:  # None where benchmarks are collected but switched off
        benchmark.extra_info["per_second"] = work / benchmark.stats.stats.median
