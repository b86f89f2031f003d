"""The peak is what a call takes, whatever earlier ones left to the allocator."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import memory

MIB = 1 << 20


def _hold(mib: int) -> int:
    held = [torch.ones(MIB // 4 // 8) for _ in range(8 * mib)]
    return len(held)


@pytest.fixture
def _resettable() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pytest.skip("the peak of the resident set cannot be reset here")


@pytest.mark.usefixtures("_resettable")
def test_the_peak_is_that_of_the_call_alone() -> None:
    _hold(48)  # freed again: its pages must not serve the measured call unseen
    for mib in (24, 6):
        done, peak = memory.with_peak(lambda mib=mib: _hold(mib))
        assert done == 8 * mib
        assert 0.9 * mib * MIB < peak < mib * MIB + 4 * MIB


def test_a_system_that_does_not_say_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _text: str) -> Any:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert memory.with_peak(lambda: 3) == (3, -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert memory.with_peak(lambda: 4) == (4, -1)
