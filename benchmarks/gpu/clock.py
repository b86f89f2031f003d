"""Timing: turns, a cold L2 cache, CUDA events, medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
_ENOUGH = 2.0  # seconds of timed calls of one provider
_LEAST, _MOST = 5, 30  # rounds


class Clock:
    """Times calls on one device.

    Args:
        device: where the calls run.
        dry: each call once, not warmed up.
    """

    def __init__(self, device: torch.device, *, dry: bool) -> None:
        self._device = device
        self._dry = dry
        self._events = device.type == "cuda"
        if self._events:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._cold = torch.ones(
                size, dtype=torch.float32, device=device
            )  # four times the cache

    def once(self, call: Call) -> float:
        """Seconds of one call, the cache cold."""
        if not self._events:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # Read, not written: lines that are written must be put back, at the cost of what is timed.
        self._cold.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def medians(self, calls: Mapping[str, Call], rounds: int | None = None) -> dict[str, float]:
        """Median seconds of each call. They take turns: what slows the card slows all alike.

        Args:
            calls: provider -> call; each is warmed up once, which also compiles its kernels.
            rounds: how many turns; None takes as many as fill two seconds, 5 to 30.
        """
        if self._dry:
            return {name: self.once(call) for name, call in calls.items()}
        for call in calls.values():
            self.once(call)
        if rounds is None:
            slowest = max(self.once(call) for call in calls.values())
            rounds = min(_MOST, max(_LEAST, int(_ENOUGH / max(slowest, 1e-9))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {name: statistics.median(values) for name, values in times.items()}

    def peak(self, call: Call) -> int:
        """Most bytes allocated on the device while ``call`` runs, inputs included; 0 on a CPU."""
        if not self._events:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)
