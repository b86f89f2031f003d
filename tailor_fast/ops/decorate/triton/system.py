"""``A = gram + λI`` as tensor cores take it: float16, scaled to a unit diagonal.

    A = m T U T,   m the mean of A's diagonal,   T_j = sqrt(A_jj / m),   U_jj = 1

The entries of ``U`` are at most 1 in size, for A is a Gram. So float16 holds them with the 11 bits
that TF32 has, at twice its speed and in half its memory, and whatever precision a user's switches
allow float32 products. What float16 rounds away is held in a second float16 matrix: both together
have 22 bits. Multiplying by ``T`` first is Jacobi preconditioning.
"""

from dataclasses import asdict
from functools import cached_property

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch

Tensor = torch.Tensor

# U is held 256 times as large: what float16 rounds away from an entry of 1e-2 is normal there too.
UNIT = 256.0
# Multiplications from which on the rounding of float16 products averages out of an energy, to 1e-6
# of it. Smaller problems are computed in float64, which costs nothing there.
FLOAT16_FROM = 1 << 30
_PANEL = 2048  # columns of the Gram that are converted to float64 at a time
# One read and two writes: 64 rows and columns are 16 KiB to load, 32 elements a thread.
HALVES = Launch(num_warps=4)
HALVES_TILE = 64
# Eight elements a thread: two loads of 16 bytes. The second pass over a row finds it in the caches.
SPLIT = Launch(num_warps=4)
SPLIT_COLS = 1024


@triton.jit
def _halves_kernel(
    gram_ptr,  # float32 [cols, cols]
    row_ptr,  # float32 [cols], UNIT / (m T); 0 where the diagonal is 0
    column_ptr,  # float32 [cols], 1 / T; 0 there too
    high_ptr,  # float16 [cols, cols]
    low_ptr,  # float16 [cols, cols]
    cols,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (i < cols) & (j < cols)
    at = i.to(tl.int64) * cols + j
    row = tl.load(row_ptr + i, mask=i < cols, other=0.0)
    column = tl.load(column_ptr + j, mask=j < cols, other=0.0)
    value = tl.load(gram_ptr + at, mask=inside, other=0.0) * row * column
    # The diagonal alone has the damping. Beyond it a Gram has no larger entry; another matrix may.
    value = tl.where(i == j, tl.where(column > 0, UNIT, 0.0), value)
    value = tl.minimum(tl.maximum(value, -UNIT), UNIT)
    high = value.to(tl.float16)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, (value - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def _split_kernel(
    x_ptr,  # float32 [rows, cols]
    factor_ptr,  # float32 [cols]
    size_ptr,  # float32 [rows], receives the largest |x factor| of each row
    high_ptr,  # float16 [rows, cols]
    low_ptr,  # float16 [rows, cols], or anything where not TWICE
    cols,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
    TWICE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, COLS)
    largest = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        inside = start + offs < cols
        x = tl.load(x_ptr + row * cols + start + offs, mask=inside, other=0.0)
        factor = tl.load(factor_ptr + start + offs, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(x * factor))
    size = tl.maximum(tl.max(largest, 0), 1e-30)  # whose inverse does not overflow
    tl.store(size_ptr + row, size)
    scale = UNIT / size
    for start in range(0, cols, COLS):
        at, inside = row * cols + start + offs, start + offs < cols
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        factor = tl.load(factor_ptr + start + offs, mask=inside, other=0.0)
        scaled = x * factor * scale
        high = scaled.to(tl.float16)
        tl.store(high_ptr + at, high, mask=inside)
        if TWICE:
            tl.store(low_ptr + at, (scaled - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def _finish_kernel(
    x_ptr,  # float32 [rows, cols]
    keep_ptr,  # uint8 [rows, cols]
    size_ptr,  # float32 [rows]
    root_ptr,  # float32 [cols]
    answer_ptr,  # float32 [rows, cols], becomes answer size root, 0 where not kept
    inner_ptr,  # float64 [rows], receives the product with x before that
    cols,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, COLS)
    size = tl.load(size_ptr + row)
    inner = tl.zeros((COLS,), tl.float64)
    for start in range(0, cols, COLS):
        at, inside = row * cols + start + offs, start + offs < cols
        root = tl.load(root_ptr + start + offs, mask=inside, other=0.0)
        answer = tl.load(answer_ptr + at, mask=inside, other=0.0) * size * root
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        inner += (x * answer).to(tl.float64)
        keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
        tl.store(answer_ptr + at, tl.where(keep, answer, 0.0), mask=inside)
    tl.store(inner_ptr + row, tl.sum(inner, 0))


@triton.jit
def _correct_kernel(
    answer_ptr,  # float32 [rows, cols], UNIT^2 / size times what is taken
    size_ptr,  # float32 [rows]
    keep_ptr,  # uint8 [rows, cols]
    weight_ptr,  # float32 [cols]
    residual_ptr,  # float32 [rows, cols], changed in place
    squared_ptr,  # float32 [rows], receives the sum of weight residual^2
    cols,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, COLS)
    scale = tl.load(size_ptr + row) / (UNIT * UNIT)
    squares = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        at, inside = row * cols + start + offs, start + offs < cols
        keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
        r = tl.load(residual_ptr + at, mask=inside, other=0.0)
        r -= scale * tl.load(answer_ptr + at, mask=inside, other=0.0)
        r = tl.where(keep, r, 0.0)
        tl.store(residual_ptr + at, r, mask=inside)
        squares += r * r * tl.load(weight_ptr + start + offs, mask=inside, other=0.0)
    tl.store(squared_ptr + row, tl.sum(squares, 0))


def split(x: Tensor, factor: Tensor, *, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``x * factor`` in float16, scaled to a largest element of ``UNIT``.

    Args:
        x: float32 ``[rows, cols]``.
        factor: float32 ``[cols]``.
        twice: whether to keep what float16 rounds away.

    Returns:
        The halves ``[rows, cols]`` (the upper one twice where the lower is not asked for), and the
        sizes that were scaled, float32 ``[rows, 1]``.
    """
    rows, cols = x.shape
    high = torch.empty_like(x, dtype=torch.float16)
    low = torch.empty_like(high) if twice else high
    size = x.new_empty(rows, 1)
    if rows:
        _split_kernel[(rows,)](
            x, factor, size, high, low, cols, UNIT=UNIT, COLS=SPLIT_COLS, TWICE=twice,
            **asdict(SPLIT),
        )  # fmt: skip
    return high, low, size


def product(x: Tensor, y: Tensor, total: Tensor | None = None) -> Tensor:
    """``x y`` of float16 matrices in float32; added to ``total``, in place, where there is one."""
    if x.is_cuda:
        if total is None:
            return torch.mm(x, y, out_dtype=torch.float32)
        out: Tensor = torch.addmm(total, x, y, out_dtype=torch.float32, out=total)
        return out
    answer = x.float() @ y.float()  # under the interpreter: the CPU has no such product
    return answer if total is None else total.add_(answer)


class System:
    """A Gram and its damping.

    Attributes:
        gram: float32 ``[cols, cols]``.
        damping: λ.
        mean: m, 1 where the whole diagonal is 0.
        root: T, float64 ``[cols]``.
        inverse_root: its inverse, 0 where T is 0: such weights stay where they are.
    """

    def __init__(self, gram: Tensor, damping: float) -> None:
        self.gram, self.damping = gram, damping
        diagonal = gram.diagonal().double() + damping
        mean = diagonal.mean().item() if len(gram) else 0.0
        self.mean = mean if mean > 0 else 1.0
        self.root = (diagonal / self.mean).sqrt()
        self.inverse_root = torch.where(self.root > 0, 1 / self.root, 0)

    @cached_property
    def weight(self) -> Tensor:
        """Squared T, float32 ``[cols]``."""
        return self.root.square().float()

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """``UNIT * U`` in float16, and what that rounds away."""
        cols = len(self.gram)
        high = torch.empty_like(self.gram, dtype=torch.float16)
        low = torch.empty_like(high)
        tiles = triton.cdiv(cols, HALVES_TILE)
        _halves_kernel[(tiles, tiles)](
            self.gram,
            (self.inverse_root * (UNIT / self.mean)).float(),
            self.inverse_root.float(),
            high,
            low,
            cols,
            UNIT=UNIT,
            TILE=HALVES_TILE,
            **asdict(HALVES),
        )
        return high, low

    def small(self, rows: int) -> bool:
        """Whether ``rows`` of products are computed in float64 because that costs nothing."""
        return rows * len(self.gram) ** 2 < FLOAT16_FROM

    def multiply(self, x: Tensor) -> Tensor:
        """``x A`` of ``x [rows, cols]`` in float64."""
        x = x.double()
        return self.undamped(x).add_(x, alpha=self.damping)

    def undamped(self, x: Tensor) -> Tensor:
        """``x gram`` of a float64 ``x [rows, cols]``."""
        out = torch.empty_like(x)
        for start in range(0, len(self.gram), _PANEL):
            columns = slice(start, start + _PANEL)
            torch.mm(x, self.gram[:, columns].double(), out=out[:, columns])
        return out

    def approximate(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """``x A`` in float32, with 21 bits of each factor: three products of float16.

        Args:
            x: float32 ``[rows, cols]``.
            keep: bool ``[rows, cols]``.

        Returns:
            The product, 0 outside ``keep``, and ``x A x`` of each row, float64 ``[rows]``.
        """
        rows, cols = x.shape
        high, low = self.halves
        root = self.root.float()
        first, second, size = split(x, root, twice=True)
        answer = product(first, high)
        answer = product(first, low, answer)
        answer = product(second, high, answer)
        inner = x.new_empty(rows, dtype=torch.float64)
        _finish_kernel[(rows,)](
            x, keep.view(torch.uint8), size * (self.mean / UNIT**2), root, answer, inner, cols,
            COLS=SPLIT_COLS, **asdict(SPLIT),
        )  # fmt: skip
        return answer, inner

    def correct_(self, residual: Tensor, z: Tensor, keep: Tensor) -> Tensor:
        """Take from a residual over T what the lower half of U's bits adds to ``z U`` on ``keep``.

        Args:
            residual: float32 ``[rows, cols]``, 0 outside ``keep``; changed in place.
            z: float32 ``[rows, cols]``, of which 11 bits are enough for that.
            keep: bool ``[rows, cols]``.

        Returns:
            Squared norm of ``residual T``, float32 ``[rows]``.
        """
        rows, cols = residual.shape
        rounded, _, size = split(z, torch.ones_like(z[0]), twice=False)
        squared = residual.new_empty(rows)
        _correct_kernel[(rows,)](
            product(rounded, self.halves[1]), size, keep.view(torch.uint8), self.weight, residual,
            squared, cols, UNIT=UNIT, COLS=SPLIT_COLS, **asdict(SPLIT),
        )  # fmt: skip
        return squared

    def energy(self, x: Tensor) -> Tensor:
        """``x A x`` summed over rows, 0-d float64; of 11 bits of ``x`` where there are many."""
        if self.small(len(x)):
            return (x.double() * self.multiply(x)).sum()
        high, low = self.halves
        rounded, _, size = split(x, self.root.float(), twice=False)
        answer = product(rounded, low, product(rounded, high))
        rows = (answer.mul_(rounded)).sum(1, dtype=torch.float64)
        return (rows * size[:, 0].double().square()).sum() * (self.mean / UNIT**3)


def forms() -> list[KernelForm]:
    """The kernels as they are launched."""
    pointers = {"gram_ptr": "*fp32", "row_ptr": "*fp32", "column_ptr": "*fp32"}
    signature = {**pointers, "high_ptr": "*fp16", "low_ptr": "*fp16", "cols": "i32"}
    constants = {"UNIT": UNIT, "TILE": HALVES_TILE}
    aligned = frozenset(signature)
    found = [KernelForm("halves", _halves_kernel, signature, constants, HALVES, aligned)]
    signature = dict.fromkeys(("x_ptr", "factor_ptr", "size_ptr"), "*fp32")
    signature |= {"high_ptr": "*fp16", "low_ptr": "*fp16", "cols": "i32"}
    finish = dict.fromkeys(("x_ptr", "size_ptr", "root_ptr", "answer_ptr"), "*fp32")
    finish |= {"keep_ptr": "*u8", "inner_ptr": "*fp64", "cols": "i32"}
    wide = {"COLS": SPLIT_COLS}
    found.append(KernelForm("finish", _finish_kernel, finish, wide, SPLIT, frozenset(finish)))
    correct = dict.fromkeys(("answer_ptr", "size_ptr", "weight_ptr", "residual_ptr"), "*fp32")
    correct |= {"keep_ptr": "*u8", "squared_ptr": "*fp32", "cols": "i32"}
    fixed = {"UNIT": UNIT, "COLS": SPLIT_COLS}
    found.append(KernelForm("correct", _correct_kernel, correct, fixed, SPLIT, frozenset(correct)))
    for twice in (True, False):
        constants = {"UNIT": UNIT, "COLS": SPLIT_COLS, "TWICE": twice}
        name, aligned = "split_twice" if twice else "split", frozenset(signature)
        found.append(KernelForm(name, _split_kernel, signature, constants, SPLIT, aligned))
    return found
