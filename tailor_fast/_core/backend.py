"""Backend choice: one function that says what is available, one that loads an implementation.

An explicit backend never falls back. ``auto`` takes the first available name of the ordered tuple
that the op gives for its device type, and logs that choice once.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Literal, get_args

from tailor_fast._core import env
from tailor_fast._core.extension import load_extension

Backend = Literal["auto", "reference", "native", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
Order = Mapping[str, tuple[str, ...]]  # device type -> backends, the preferred one first

_log = logging.getLogger("tailor_fast")


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run here; the message says why."""


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Return why ``backend`` cannot run on ``device_type``, or None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type != "cpu":
            return f"native kernels run on cpu tensors, not on {device_type}"
        module = load_extension()
        return (
            f"the C++ extension did not load ({module})" if isinstance(module, Exception) else None
        )
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'tailor_fast[gpu]')"
        if device_type != "cuda" and not env.triton_interpreted():
            return f"triton kernels run on cuda tensors, not on {device_type}"
        return None
    if device_type != "cuda":
        return f"cuda kernels run on cuda tensors, not on {device_type}"
    module = load_extension()
    if isinstance(module, Exception):
        return f"the C++ extension did not load ({module})"
    return None if hasattr(module, "cuda") else "the extension was built without CUDA kernels"


@functools.cache
def _select(op: str, order: tuple[str, ...], backend: str, device_type: str) -> ModuleType:
    if backend == "auto":
        for name in order:
            if why_unavailable(name, device_type) is None:
                _log.debug("%s on %s: backend %s", op, device_type, name)
                return importlib.import_module(f"tailor_fast.ops.{op}.{name}")
        reasons = "; ".join(f"{name}: {why_unavailable(name, device_type)}" for name in order)
        raise BackendUnavailableError(f"{op}: no backend runs on {device_type}; {reasons}")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend not in order:
        has = ", ".join(order)
        raise BackendUnavailableError(
            f"{op}: backend {backend!r} is not implemented on {device_type}; it has {has}"
        )
    reason = why_unavailable(backend, device_type)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {backend!r} is not available: {reason}")
    return importlib.import_module(f"tailor_fast.ops.{op}.{backend}")


def implementation(op: str, order: Order, backend: str, device_type: str) -> ModuleType:
    """Load the module that implements ``op``.

    Args:
        op: folder name under ``tailor_fast.ops``.
        order: backends per device type, the preferred one first.
        backend: one of ``BACKENDS``.
        device_type: ``tensor.device.type`` of the op's first tensor.

    Raises:
        ValueError: ``backend`` is no backend's name, or the device type is not supported.
        BackendUnavailableError: the backend exists but cannot run here.
    """
    if device_type not in order:
        raise ValueError(f"{op}: device must be one of {', '.join(order)}; got {device_type}")
    return _select(op, order[device_type], backend, device_type)
