"""The ops: gram, select, decorate, codec. Each folder is one op, each function a kernel's contract.

Importing an op registers it with torch; a backend is imported when it is first called.
"""

import importlib
from types import ModuleType

import torch

from tailor_fast._core.backend import Order, why_unavailable

OPS = ("gram", "select", "decorate", "codec")


def backends() -> dict[str, dict[str, dict[str, str | None]]]:
    """Say which backends each op has, and why one cannot run here.

    Returns:
        ``result[op][device_type][backend]``: None when the backend can run, else the reason. Per
        device type the backends stand in the order in which ``auto`` tries them.
    """
    no_cuda = None if torch.cuda.is_available() else "torch sees no CUDA device"
    result = {}
    for op in OPS:
        order: Order = importlib.import_module(f"{__name__}.{op}.schema").ORDER
        result[op] = {
            device: {
                name: (no_cuda if device == "cuda" else None) or why_unavailable(name, device)
                for name in names
            }
            for device, names in order.items()
        }
    return result


def __getattr__(name: str) -> ModuleType:
    """Import an op when it is first used."""
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
