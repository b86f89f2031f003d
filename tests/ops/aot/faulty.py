"""Kernels that must be found at fault: the proof that the compile test sees what it looks for."""

import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch


@triton.jit
def hungry_kernel(x, y, BLOCK: tl.constexpr):  # noqa: N803  triton's spelling of constants
    """Two reductions, the second of which needs all of the block again: it stays in registers."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    centred = values - tl.sum(values) / BLOCK
    tl.store(y + at, centred / tl.sum(centred * centred))


@triton.jit
def wide_kernel(a, b, c, TILE: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr):  # noqa: N803
    """A product whose pipelined tiles do not fit on the chip."""
    rows, inner = tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), tl.float32)
    for step in range(STEPS):
        left = tl.load(a + rows[:, None] * (DEPTH * STEPS) + inner[None, :] + step * DEPTH)
        right = tl.load(b + (inner[:, None] + step * DEPTH) * TILE + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * TILE + rows[None, :], total)


@triton.jit
def far_kernel(x, stride, rows, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Rows that may lie further apart than 32 bits reach."""
    at = tl.program_id(0)
    for row in range(0, rows, 2):
        start = at * stride
        if WIDE:
            start = at.to(tl.int64) * stride
        tl.store(x + start + tl.arange(0, BLOCK), 0.0)
        at += row


@triton.jit
def method_kernel(x, at):
    """Asks an argument for what a constant does not have."""
    tl.store(x + at.to(tl.int64), 0.0)


@triton.jit
def broken_kernel(x):
    """Arithmetic between a pointer and a float."""
    tl.store(x, x * 0.5)


POINTERS = {"x": "*fp32", "y": "*fp32"}
FAR = {"x": "*fp32", "stride": "i32", "rows": "i32"}
TILES = {"TILE": 128, "DEPTH": 128, "STEPS": 16}


def kernels() -> tuple[KernelForm, ...]:
    """One form per fault, and one without."""
    return (
        KernelForm("fits", hungry_kernel, POINTERS, {"BLOCK": 1024}, Launch(4)),
        KernelForm("spills", hungry_kernel, POINTERS, {"BLOCK": 131072}, Launch(32)),
        KernelForm(
            "shared",
            wide_kernel,
            {"a": "*bf16", "b": "*bf16", "c": "*fp32"},
            TILES,
            Launch(8, 6),
            frozenset("abc"),
        ),
        KernelForm("near", far_kernel, FAR, {"WIDE": False, "BLOCK": 64}, Launch(4)),
        KernelForm("far", far_kernel, FAR, {"WIDE": True, "BLOCK": 64}, Launch(4)),
        KernelForm("method", method_kernel, {"x": "*fp32", "at": "i32"}, {}, Launch(4)),
        KernelForm("broken", broken_kernel, {"x": "*fp32"}, {}, Launch(4)),
        KernelForm("misdescribed", broken_kernel, {"z": "*fp32"}, {}, Launch(4)),
    )
