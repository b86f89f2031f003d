"""Timing on a machine that others use too: interleaved rounds, medians, and the two ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_COPY_BYTES = 256 * 2**20
_MATMUL = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}
_ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do.

    Attributes:
        bytes_per_second: of a large copy, bytes read and bytes written counted.
        flops_per_second: of a large square matrix product, in float32 on the CPU and bfloat16 on a
            GPU.
    """

    bytes_per_second: float
    flops_per_second: float

    def floor(self, moved: int, flops: int) -> float:
        """Seconds below which no kernel gets that moves and computes so much."""
        return max(moved / self.bytes_per_second, flops / self.flops_per_second)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, to the end of the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure both ceilings of ``device``, each the best of five calls after one to warm up."""
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size, dtype = _MATMUL[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(matrix)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(matrix, matrix, out=product)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds_of(call, device) for _ in range(_ROUNDS))

    return Ceilings(2 * _COPY_BYTES / best(copy), 2 * size**3 / best(multiply))
