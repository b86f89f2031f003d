"""How much memory there is, of the machine or of what a container is given of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tailor_fast._core.errors import UsageError

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_IN_USE = 0.94  # share of a GPU's memory that tensors get: blocks have ends, libraries workspaces


def memory() -> tuple[int, int]:
    """Return bytes of memory that are free, and all, as far as the system tells.

    Memory that holds copies of files counts as free. Of a control group, the tightest limit on the
    way to its root counts.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line[:13] == "MemAvailable:")
    except (OSError, StopIteration):
        pass  # no such file system: what is there is taken for free
    for place in _groups():
        # version 2, then version 1
        for most, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = int((place / most).read_text())
                left = limit - int((place / used).read_text())
                left += _file_bytes(place)
            except (OSError, ValueError):  # no such file, or "max"
                continue
            total, free = min(total, limit), min(free, left)
    return max(free, 0), total


def _groups() -> list[Path]:
    """Folders of the control groups that this process is in, with all above them."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds in ("", "memory"):
            root = _ROOT / kinds
            place = root / name.lstrip("/")
            found += [place, *(above for above in place.parents if above.is_relative_to(root))]
            found.append(root)  # the group's own folder, where it is mounted as a root
    return list(dict.fromkeys(found))


def _file_bytes(place: Path) -> int:
    """Bytes of a group that hold copies of files, and can be taken back at once."""
    lines = (line.split() for line in (place / "memory.stat").read_text().splitlines())
    return sum(int(value) for key, value in lines if key == "inactive_file")


def check_memory(need: int, limit: int | None) -> list[str]:
    """Check what a run is to take against the memory that there is.

    Args:
        need: bytes at the peak, as planned.
        limit: what the user gives it, ``max_ram``; None without a limit.

    Returns:
        A sentence if less than that is free at the moment.

    Raises:
        UsageError: the machine does not have it.
    """
    free, total = memory()
    if limit is not None and limit > total:
        raise UsageError(
            f"max_ram of {limit} bytes is more than the memory of {total} bytes; expected at most"
            " that"
        )
    if need > total:
        raise UsageError(
            f"the run takes {need} bytes of memory, and there are {total}; expected a machine with"
            " more, a smaller max_ram, fewer layers (`targets`), or propagate 'none'"
        )
    if need > free:
        return [f"takes {need} bytes of memory, of which {free} are free at the moment"]
    return []


def release_free_memory() -> None:
    """Give the pages of freed memory back to the system, where the C library (glibc) can.

    It keeps them by itself, between pieces that are in use: hundreds of MiB after matrices of
    several sizes have come and gone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def naming(stage: str, layer: str) -> Iterator[None]:
    """Say where it was that a device had no memory left.

    Raises:
        UsageError: it had none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{stage} of {layer}: the device has no memory left; expected room for what `plan`"
            " shows; give a smaller --max-vram, which takes smaller parts at a time, or a smaller"
            " --batch-size"
        ) from error


def hold_to(limit: int | None, device: torch.device) -> int | None:
    """Return how much of ``device`` a run may take: ``limit``, or what is free; None on a CPU.

    On a GPU no more than that is given out from then on.
    """
    if device.type != "cuda":
        return limit
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    most = free if limit is None else min(limit, free)
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)
    return int(most * _IN_USE)


def check_device_memory(need: int, device: torch.device) -> list[str]:
    """The same for the memory of a GPU; nothing for another device."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    if need > total:
        raise UsageError(
            f"the run takes {need} bytes of memory on {device}, which has {total}; expected a"
            " larger one, fewer layers (`targets`), propagate 'none', or device 'cpu'"
        )
    if need > free:
        return [f"takes {need} bytes of memory on {device}, of which {free} are free at the moment"]
    return []
