"""Backends that a test runs on: one that cannot run here is skipped, with its reason.

``select``, ``gram`` and ``decorate`` have their C++ kernels once per instruction set, and tests run
on each set that the machine has. The last two take products of matrices from the extension or from
torch: theirs run on each set with the extension's products, and on the last one with torch's,
whatever this CPU would be given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest

from tailor_fast._core.backend import why_unavailable
from tailor_fast._core.extension import extension, load_extension

needs_native = pytest.mark.skipif(
    why_unavailable("native", "cpu") is not None, reason=str(why_unavailable("native", "cpu"))
)
NATIVE = pytest.param("native", marks=needs_native)


INSTRUCTION_SETS = (
    [] if isinstance(load_extension(), ImportError) else extension().instruction_sets()
)
KERNELS = [*INSTRUCTION_SETS, "torch"] if INSTRUCTION_SETS else []
NATIVES = [f"native {name}" for name in KERNELS] or [NATIVE]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The kernels of one instruction set, for all ops, until the block ends."""
    extension().use_instruction_set(name)
    try:
        yield
    finally:
        extension().use_instruction_set(INSTRUCTION_SETS[-1])


def on_kernels(name: str) -> Iterator[str]:
    """Body of a fixture: the kernels of ``gemm``, ``gram`` and ``decorate``.

    Args:
        name: an instruction set, or ``torch``: the last set, and products from torch.
    """
    gemm = import_module("tailor_fast.ops.gemm")
    isa = INSTRUCTION_SETS[-1] if name == "torch" else name
    with pytest.MonkeyPatch.context() as patch, instruction_set(isa):
        patch.setattr(gemm, "has_kernels", lambda: name != "torch")
        yield name


def preferring(op: str, backend: str) -> Iterator[str]:
    """Body of a fixture: ``auto`` takes ``backend`` on CPU tensors while the tests run.

    Args:
        op: its name.
        backend: its name; one of ``NATIVES`` says with which kernels.
    """
    backend, *kernels = backend.split()
    order = import_module(f"tailor_fast.ops.{op}.schema").ORDER
    before = order["cpu"]
    order["cpu"] = (backend, *(name for name in before if name != backend))
    if kernels:
        for _ in on_kernels(*kernels):
            yield backend
    else:
        yield backend
    order["cpu"] = before
