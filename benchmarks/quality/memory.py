"""The memory that a call takes at its highest, beyond what was in use before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def with_peak(call: Callable[[], T]) -> tuple[T, int]:
    """Return what ``call`` returns, and the growth of the resident set at its peak, in bytes.

    The allocator first gives its free pages back to the system: what a call takes again out of
    pages that an earlier one left behind would not show. The figure is -1 where the system does
    not let the peak be reset (Linux does) or the C library has no ``malloc_trim`` (glibc has).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (AttributeError, OSError):
        return call(), -1
    done = call()
    return done, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
