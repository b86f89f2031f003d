"""Masked conjugate gradients on many rows at once: one float16 GEMM and one kernel per iteration.

Each row solves ``U_KK z = r_K`` on its own support K. The direction ``d`` is a float16 vector, the
rounded one and no other: step and residual move along the same ``d``, so they stay consistent, and
rounding costs some conjugacy only. Because of that the coefficients come from ``d`` itself:

    q = (d U)_K,  a = r·d / d·q,  z += a d,  r -= a q,  b = -r·q / d·q,  d <- half(c (r + b d))

with c such that ``|d| = UNIT``. One program owns one row, whose sums have one order. A row that has
ended stands still, and is dropped once a quarter of the rows have; the host asks every few
iterations only.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch
from tailor_fast.ops.decorate.triton.system import UNIT, System, product

Tensor = torch.Tensor

# Iterations between two looks at how many rows go on. A look waits for the device, 20 us or so,
# where an iteration of 4096 rows and columns takes 300; the last look is at most this late.
LOOK_EVERY = 4
_COMPACT_BELOW = 0.75  # share of unfinished rows; a copy of the tile costs a third of an iteration
# Four elements a thread: 16 bytes of a float32 vector in one load. The second and third pass over
# a row find it in the caches.
UPDATE = Launch(num_warps=8)
UPDATE_COLS = 1024


@triton.jit
def _update_kernel(
    product_ptr,  # float32 [rows, cols], d U times UNIT
    direction_ptr,  # float16 [rows, cols]
    residual_ptr,  # float32 [rows, cols]
    step_ptr,  # float32 [rows, cols], z over UNIT
    keep_ptr,  # uint8 [rows, cols]
    weight_ptr,  # float32 [cols], squared factor from r to the residual that is to become small
    target_ptr,  # float32 [rows], its squared norm at which a row ends
    live_ptr,  # int32 [rows], 1 while a row goes on
    count_ptr,  # int32 [rows], iterations of each row
    cols,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(live_ptr + row) == 0:
        return
    offs = tl.arange(0, COLS)
    curvatures = tl.zeros((COLS,), tl.float32)
    slopes = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        at, inside = row * cols + start + offs, start + offs < cols
        d = tl.load(direction_ptr + at, mask=inside, other=0.0).to(tl.float32)
        curvatures += d * tl.load(product_ptr + at, mask=inside, other=0.0)
        slopes += d * tl.load(residual_ptr + at, mask=inside, other=0.0)
    curvature, slope = tl.sum(curvatures, 0), tl.sum(slopes, 0)
    if (curvature > 0) & (curvature < float("inf")):
        length = slope / curvature
        sizes = tl.zeros((COLS,), tl.float32)
        squares = tl.zeros((COLS,), tl.float32)
        pulls = tl.zeros((COLS,), tl.float32)
        crosses = tl.zeros((COLS,), tl.float32)
        lengths = tl.zeros((COLS,), tl.float32)
        for start in range(0, cols, COLS):
            at, inside = row * cols + start + offs, start + offs < cols
            keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
            d = tl.load(direction_ptr + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(product_ptr + at, mask=inside, other=0.0)
            r = tl.load(residual_ptr + at, mask=inside, other=0.0)
            r = tl.where(keep, r - length * q, 0.0)
            sizes += r * r * tl.load(weight_ptr + start + offs, mask=inside, other=0.0)
            squares += r * r
            pulls += r * q
            crosses += r * d
            lengths += d * d
        size = tl.sum(sizes, 0)
        back = -tl.sum(pulls, 0) / curvature
        square = tl.sum(squares, 0) + back * (2 * tl.sum(crosses, 0) + back * tl.sum(lengths, 0))
        scale = UNIT / tl.sqrt(tl.maximum(square, 1e-30))
        for start in range(0, cols, COLS):
            at, inside = row * cols + start + offs, start + offs < cols
            keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
            d = tl.load(direction_ptr + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(product_ptr + at, mask=inside, other=0.0)
            r = tl.load(residual_ptr + at, mask=inside, other=0.0)
            r = tl.where(keep, r - length * q, 0.0)
            z = tl.load(step_ptr + at, mask=inside, other=0.0) + length * d
            tl.store(residual_ptr + at, r, mask=inside)
            tl.store(step_ptr + at, z, mask=inside)
            tl.store(direction_ptr + at, ((r + back * d) * scale).to(tl.float16), mask=inside)
        tl.store(live_ptr + row, (size > tl.load(target_ptr + row)).to(tl.int32))
        tl.store(count_ptr + row, tl.load(count_ptr + row) + 1)
    else:  # rounding has left no curvature along d, or the matrix has none
        tl.store(live_ptr + row, 0)


class _Tile(NamedTuple):
    """The rows that still go on, all ``[rows, ...]``; ``place`` says where they came from."""

    place: Tensor
    direction: Tensor
    residual: Tensor
    step: Tensor
    keep: Tensor
    target: Tensor
    live: Tensor
    done: Tensor

    def update(self, answer: Tensor, weight: Tensor) -> None:
        _update_kernel[(len(self.place),)](
            answer,
            self.direction,
            self.residual,
            self.step,
            self.keep,
            weight,
            self.target,
            self.live,
            self.done,
            answer.shape[1],
            UNIT=UNIT,
            COLS=UPDATE_COLS,
            **asdict(UPDATE),
        )


def conjugate_gradients(
    system: System,
    residual: Tensor,
    keep: Tensor,
    live: Tensor,
    target: Tensor,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Solve ``U_KK z = residual`` for every row, from 0, with the upper half of U's bits.

    Args:
        system: the shared matrix.
        residual: float32 ``[rows, cols]``, 0 outside ``keep``; becomes the residual of the result
            as the recurrence has it.
        keep: bool ``[rows, cols]``, the supports.
        live: bool ``[rows]``, False where a row has nothing to do.
        target: of ``|residual T|^2``, where a row ends; float32 ``[rows]``.
        max_iterations: limit.

    Returns:
        z ``[rows, cols]``, 0 outside ``keep``, and the iterations of the slowest row.
    """
    high, _ = system.halves
    result = torch.zeros_like(residual)
    norm = residual.norm(dim=1, keepdim=True)
    tile = _Tile(
        torch.arange(len(residual), device=residual.device),
        (residual * (UNIT / norm)).half(),
        residual,
        result,
        keep.view(torch.uint8),
        target,
        live.int(),
        target.new_zeros(len(target), dtype=torch.int32),
    )
    slowest = 0
    for iteration in range(max_iterations):
        if iteration % LOOK_EVERY == 0:
            unfinished, most = torch.stack([tile.live.sum(), tile.done.max()]).tolist()
            slowest = max(slowest, most)
            if unfinished == 0:
                break
            if unfinished < _COMPACT_BELOW * len(tile.place):
                _put_back(tile, residual, result)
                rows = tile.live.nonzero()[:, 0]
                tile = _Tile(*(part[rows] for part in tile))
        tile.update(product(tile.direction, high), system.weight)
    _put_back(tile, residual, result)
    return result.mul_(UNIT), max(slowest, int(tile.done.max()))


def _put_back(tile: _Tile, residual: Tensor, result: Tensor) -> None:
    """Write rows of a copy where they belong; the first tile is no copy."""
    if tile.step is not result:
        residual[tile.place], result[tile.place] = tile.residual, tile.step


def forms() -> list[KernelForm]:
    """The kernel as it is launched."""
    signature = {
        "product_ptr": "*fp32",
        "direction_ptr": "*fp16",
        "residual_ptr": "*fp32",
        "step_ptr": "*fp32",
        "keep_ptr": "*u8",
        "weight_ptr": "*fp32",
        "target_ptr": "*fp32",
        "live_ptr": "*i32",
        "count_ptr": "*i32",
        "cols": "i32",
    }
    constants = {"UNIT": UNIT, "COLS": UPDATE_COLS}
    aligned = frozenset(signature)
    return [KernelForm("update", _update_kernel, signature, constants, UPDATE, aligned)]
