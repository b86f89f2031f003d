"""Gate, then time: the rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast.bench.cases import SIZES, Case, make_cases
from tailor_fast.bench.measure import Ceilings, interleaved
from tailor_fast.ops import OPS, backends

REFERENCE = "reference"
_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One backend at one kind of work.

    Attributes:
        op: the op.
        work: what was computed.
        shape: sizes and dtype.
        backend: who computed it.
        seconds: median wall time; None when the backend failed its gate.
        floor: seconds that the machine's ceilings leave at best.
        speedup: times as fast as the reference backend, plain torch.
        problem: why there is no time; None when there is one.
    """

    op: str
    work: str
    shape: str
    backend: str
    seconds: float | None
    floor: float
    speedup: float | None
    problem: str | None = None


def run_bench(
    device: torch.device,
    ceilings: Ceilings,
    *,
    ops: Sequence[str] = OPS,
    size: str = "medium",
    rounds: int = _ROUNDS,
) -> Iterator[Row]:
    """Yield a row per backend and kind of work, each as soon as it is measured.

    Args:
        device: where to run.
        ceilings: of that device.
        ops: which ops.
        size: ``"small"``, ``"medium"`` or ``"large"``.
        rounds: timed calls of each backend.

    Raises:
        UsageError: no such op or size.
    """
    for value, known, name in (
        *((op, OPS, "op") for op in ops),
        (size, tuple(SIZES), "size"),
    ):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    for op in ops:
        runnable = _runnable(op, device.type)
        for case in make_cases(op, size, device):
            yield from _rows(case, runnable, device, ceilings, rounds)


def _runnable(op: str, device_type: str) -> list[str]:
    """Backends that can run; on the CPU Triton is its interpreter, which nobody waits for."""
    states = backends()[op][device_type]
    names = [name for name, why in states.items() if why is None]
    return [name for name in names if (device_type, name) != ("cpu", "triton")]


def _rows(
    case: Case, runnable: Sequence[str], device: torch.device, ceilings: Ceilings, rounds: int
) -> Iterator[Row]:
    expected = case.call(REFERENCE)
    problems: dict[str, str | None] = {REFERENCE: None}
    for name in runnable:
        if name != REFERENCE:
            problems[name] = case.gate(case.call(name), expected)
    del expected
    sound = [name for name in runnable if problems[name] is None]
    calls = {name: partial(case.call, name) for name in sound}
    seconds = interleaved(calls, device, rounds)
    floor = ceilings.floor(case.moved, case.flops)
    for name in runnable:
        found = seconds.get(name)
        speedup = None if found is None else seconds[REFERENCE] / found
        yield Row(case.op, case.work, case.shape, name, found, floor, speedup, problems[name])
