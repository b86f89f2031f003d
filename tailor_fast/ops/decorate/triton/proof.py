"""From a residual to a round of iterations and back to a proof: passes over float64 rows, fused.

An exact solve holds a patch and its residual in float64, ``[rows, cols]`` each, and improves some
of the rows at a time. Plain torch would copy those rows out, and make a tensor of every step of a
formula; here each row is read and written once, where it lies. One program owns one row, whose
sums have one order.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch

Tensor = torch.Tensor

# Four elements a thread: two loads of 16 bytes of a float64 vector. The proof's second pass over a
# row finds it in the caches.
ROWS = Launch(num_warps=8)
ROWS_COLS = 1024


@triton.jit
def _start_kernel(
    residual_ptr,  # float64 [all rows, cols]
    size_ptr,  # float64 [rows], its norm
    factor_ptr,  # float64 [cols]
    rows_ptr,  # int64 [rows], which they are of all
    start_ptr,  # float32 [rows, cols], receives residual / size * factor
    cols,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows_ptr + row)
    size = tl.load(size_ptr + row)
    offs = tl.arange(0, COLS)
    for start in range(0, cols, COLS):
        col, inside = start + offs, start + offs < cols
        r = tl.load(residual_ptr + place * cols + col, mask=inside, other=0.0)
        factor = tl.load(factor_ptr + col, mask=inside, other=0.0)
        tl.store(start_ptr + row * cols + col, (r / size * factor).to(tl.float32), mask=inside)


@triton.jit
def _candidate_kernel(
    step_ptr,  # float32 [rows, cols]
    size_ptr,  # float64 [rows]
    factor_ptr,  # float64 [cols]
    patch_ptr,  # float64 [all rows, cols]
    delta_ptr,  # float32 [rows, cols]
    rows_ptr,  # int64 [rows]
    candidate_ptr,  # float64 [rows, cols], receives patch + step * factor * size
    lacking_ptr,  # float64 [rows, cols], receives delta - candidate where LACKING
    cols,
    LACKING: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows_ptr + row)
    size = tl.load(size_ptr + row)
    offs = tl.arange(0, COLS)
    for start in range(0, cols, COLS):
        col, inside = start + offs, start + offs < cols
        at = row * cols + col
        step = tl.load(step_ptr + at, mask=inside, other=0.0).to(tl.float64)
        factor = tl.load(factor_ptr + col, mask=inside, other=0.0)
        p = tl.load(patch_ptr + place * cols + col, mask=inside, other=0.0)
        p += step * factor * size
        tl.store(candidate_ptr + at, p, mask=inside)
        if LACKING:
            d = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float64)
            tl.store(lacking_ptr + at, d - p, mask=inside)


@triton.jit
def _equations(
    product_ptr, delta_ptr, keep_ptr, rhs_ptr, at, inside, p, damping, RHS: tl.constexpr
):
    """Delta, right-hand side and residual of some columns of a row whose patch is ``p``."""
    keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
    d = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float64)
    product = tl.load(product_ptr + at, mask=inside, other=0.0)
    if RHS:
        b = tl.load(rhs_ptr + at, mask=inside, other=0.0).to(tl.float64) + damping * d
        r = b - (product + damping * p)
    else:  # the product is that of d - p: b stands for the whole residual
        b = product + damping * (d - p)
        r = b
    return d, b, tl.where(keep, r, 0.0)


@triton.jit
def _proof_kernel(
    product_ptr,  # float64 [rows, cols]: candidate @ gram with RHS, else (delta - candidate) @ gram
    candidate_ptr,  # float64 [rows, cols]
    delta_ptr,  # float32 [rows, cols]
    keep_ptr,  # uint8 [rows, cols]
    rhs_ptr,  # float32 [rows, cols], or anything where not RHS
    damping_ptr,  # float64 [1]: an argument that is no tensor would be float32
    rows_ptr,  # int64 [rows]
    patch_ptr,  # float64 [all rows, cols], becomes the candidate where that is better
    residual_ptr,  # float64 [all rows, cols], becomes its residual there
    loss_ptr,  # float64 [all rows], becomes its objective there
    floor_ptr,  # float64 [all rows], becomes its floor there, see `improve_`
    size_ptr,  # float64 [rows], receives the norm of the residual that remains
    cols,
    RHS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows_ptr + row) * cols
    damping = tl.load(damping_ptr)
    offs = tl.arange(0, COLS)
    falls = tl.zeros((COLS,), tl.float64)
    values = tl.zeros((COLS,), tl.float64)
    squares = tl.zeros((COLS,), tl.float64)
    floors = tl.zeros((COLS,), tl.float64)
    before = tl.zeros((COLS,), tl.float64)
    for start in range(0, cols, COLS):
        col, inside = start + offs, start + offs < cols
        at = row * cols + col
        p = tl.load(candidate_ptr + at, mask=inside, other=0.0)
        d, b, r = _equations(
            product_ptr, delta_ptr, keep_ptr, rhs_ptr, at, inside, p, damping, RHS=RHS
        )
        old_p = tl.load(patch_ptr + place + col, mask=inside, other=0.0)
        old_r = tl.load(residual_ptr + place + col, mask=inside, other=0.0)
        falls += (p - old_p) * (old_r + r)
        squares += r * r
        before += old_r * old_r
        if RHS:
            values += damping * d * d - p * (b + r)
            floors += (d - p) * (d - p)
        else:
            values += (d - p) * b
    size = tl.sum(before, 0)
    if tl.sum(falls, 0) > 0:
        size = tl.sum(squares, 0)
        value = tl.sum(values, 0)
        floor = value
        if RHS:
            floor = damping * tl.sum(floors, 0)
        tl.store(loss_ptr + tl.load(rows_ptr + row), value)
        tl.store(floor_ptr + tl.load(rows_ptr + row), floor)
        for start in range(0, cols, COLS):
            col, inside = start + offs, start + offs < cols
            at = row * cols + col
            p = tl.load(candidate_ptr + at, mask=inside, other=0.0)
            _, _, r = _equations(
                product_ptr, delta_ptr, keep_ptr, rhs_ptr, at, inside, p, damping, RHS=RHS
            )
            tl.store(patch_ptr + place + col, p, mask=inside)
            tl.store(residual_ptr + place + col, r, mask=inside)
    tl.store(size_ptr + row, tl.sqrt(size))


class State(NamedTuple):
    """Where all rows of a tile stand, float64.

    Attributes:
        patch: p ``[rows, cols]``.
        residual: ``(b - Ap)_K`` ``[rows, cols]``.
        loss: the objective ``[rows]``.
        floor: at most ``|r|² / λ`` more than the minimum, ``[rows]``: the objective itself, or
            ``λ |d - p|²`` where a constant of it is not known.
    """

    patch: Tensor
    residual: Tensor
    loss: Tensor
    floor: Tensor


def start_of(state: State, rows: Tensor, size: Tensor, factor: Tensor) -> Tensor:
    """``residual / size * factor`` of ``rows`` int64 ``[n]``, float32 ``[n, cols]``."""
    cols = state.residual.shape[1]
    start = state.residual.new_empty((len(rows), cols), dtype=torch.float32)
    _start_kernel[(len(rows),)](
        state.residual, size, factor, rows, start, cols, COLS=ROWS_COLS, **asdict(ROWS)
    )
    return start


def candidate_of(
    state: State, rows: Tensor, step: Tensor, size: Tensor, factor: Tensor, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The patch of ``rows`` after a step, float64 ``[n, cols]``, and what is to be multiplied.

    Args:
        state: of all rows.
        rows: int64 ``[n]``.
        step: float32 ``[n, cols]``, over ``factor`` and ``size``.
        size: float64 ``[n]``.
        factor: float64 ``[cols]``.
        delta: float32 ``[n, cols]``; None where the product is that of the candidate.

    Returns:
        The candidate, and ``delta - candidate``, or the candidate once more.
    """
    candidate = torch.empty_like(step, dtype=torch.float64)
    lacking = candidate if delta is None else torch.empty_like(candidate)
    _candidate_kernel[(len(rows),)](
        step, size, factor, state.patch, step if delta is None else delta, rows, candidate, lacking,
        step.shape[1], LACKING=delta is not None, COLS=ROWS_COLS, **asdict(ROWS),
    )  # fmt: skip
    return candidate, lacking


def improve_(
    state: State,
    rows: Tensor,
    candidate: Tensor,
    product: Tensor,
    delta: Tensor,
    keep: Tensor,
    rhs: Tensor | None,
    damping: Tensor,
) -> Tensor:
    """Move ``state`` to ``candidate`` in those of ``rows`` whose objective falls by that.

    It falls by ``step · (residual before + after)``; where rounding made it rise, the row stays.

    Args:
        state: of all rows, changed in place.
        rows: int64 ``[n]``, each once.
        candidate: float64 ``[n, cols]``, 0 outside ``keep``.
        product: float64 ``[n, cols]``: ``candidate @ gram`` with ``rhs``, else
            ``(delta - candidate) @ gram``.
        delta: float32 ``[n, cols]``.
        keep: bool ``[n, cols]``.
        rhs: undamped right-hand side, float32 ``[n, cols]``; None stands for ``delta @ gram``.
        damping: λ, float64 ``[1]``.

    Returns:
        Norm of the residual of each of ``rows``, float64 ``[n]``.
    """
    size = candidate.new_empty(len(rows))
    _proof_kernel[(len(rows),)](
        product, candidate, delta, keep.view(torch.uint8), delta if rhs is None else rhs, damping,
        rows, *state, size, candidate.shape[1],
        RHS=rhs is not None, COLS=ROWS_COLS, **asdict(ROWS),
    )  # fmt: skip
    return size


def forms() -> list[KernelForm]:
    """The kernels as they are launched."""
    wide = dict.fromkeys(("residual_ptr", "size_ptr", "factor_ptr"), "*fp64")
    start = {**wide, "rows_ptr": "*i64", "start_ptr": "*fp32", "cols": "i32"}
    candidate = {
        "step_ptr": "*fp32",
        "size_ptr": "*fp64",
        "factor_ptr": "*fp64",
        "patch_ptr": "*fp64",
        "delta_ptr": "*fp32",
        "rows_ptr": "*i64",
        "candidate_ptr": "*fp64",
        "lacking_ptr": "*fp64",
        "cols": "i32",
    }
    proof = {
        "product_ptr": "*fp64",
        "candidate_ptr": "*fp64",
        "delta_ptr": "*fp32",
        "keep_ptr": "*u8",
        "rhs_ptr": "*fp32",
        "damping_ptr": "*fp64",
        "rows_ptr": "*i64",
    }
    names = ("patch_ptr", "residual_ptr", "loss_ptr", "floor_ptr", "size_ptr")
    proof |= dict.fromkeys(names, "*fp64") | {"cols": "i32"}
    found = [KernelForm("start", _start_kernel, start, {"COLS": ROWS_COLS}, ROWS, frozenset(start))]
    for yes in (True, False):
        constants: dict[str, object] = {"LACKING": yes, "COLS": ROWS_COLS}
        name, aligned = "candidate_lacking" if yes else "candidate", frozenset(candidate)
        found.append(KernelForm(name, _candidate_kernel, candidate, constants, ROWS, aligned))
        constants = {"RHS": yes, "COLS": ROWS_COLS}
        name, aligned = "proof_rhs" if yes else "proof", frozenset(proof)
        found.append(KernelForm(name, _proof_kernel, proof, constants, ROWS, aligned))
    return found
