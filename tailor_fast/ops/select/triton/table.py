"""Many tensors in one grid: a table of what each unit of scope is, and which unit a program has.

Programs are numbered through: ``GROUP`` neighbours belong to one unit, whose number is read from a
map. What a kernel would be given as arguments stands in the unit's line of the table, addresses
included. Both travel to the device in one copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.options import BLOCK
from tailor_fast.ops.select.triton.pair import FLAT, Pair, ceil_div
from tailor_fast.ops.select.triton.scores import OBS, ROW, TENSOR

GROUP = tl.constexpr(16)  # tiles of one program of the kernels that read lists

# Entries of a line, int64. Addresses of tensors that a score does not depend on are those of tuned.
BASE = tl.constexpr(0)
TUNED = tl.constexpr(1)
COLUMN = tl.constexpr(2)  # column weights
AFFINE = tl.constexpr(3)
MASK = tl.constexpr(4)
ROWS = tl.constexpr(5)
COLS = tl.constexpr(6)
SIZE = tl.constexpr(7)
BLOCKS = tl.constexpr(8)
NUMBER = tl.constexpr(9)  # of the block of columns that the unit is
KEPT = tl.constexpr(10)
TILES = tl.constexpr(11)
FIRST = tl.constexpr(12)  # number of the unit's first tile in the grid
MEMBER = tl.constexpr(13)  # which tensor the unit belongs to
LINE = tl.constexpr(16)

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNMENT = 16


@triton.jit
def line_of(table_ptr, map_ptr, group):
    """Line of the unit that a group of tiles belongs to, its number, and its first tile."""
    unit = tl.load(map_ptr + group)
    line_ptr = table_ptr + unit * LINE
    return line_ptr, unit, tl.load(line_ptr + FIRST)


@triton.jit
def _address(line_ptr, entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(line_ptr + entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def tensors_of(
    line_ptr, DTYPE: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Base, tuned, column weights and affine maps of a unit."""
    base = _address(line_ptr, BASE, DTYPE, ALIGNED)
    tuned = _address(line_ptr, TUNED, DTYPE, ALIGNED)
    column = tuned
    if KIND >= OBS:
        column = _address(line_ptr, COLUMN, tl.float32, ALIGNED)
    affine = tuned
    if NORM == TENSOR or NORM == ROW:  # noqa: SIM109  the compiler knows no tuples
        affine = _address(line_ptr, AFFINE, tl.float32, False)
    return base, tuned, column, affine


@triton.jit
def sizes_of(line_ptr, ALIGNED: tl.constexpr):
    """Rows, columns, elements and blocks of a unit's tensor, and the unit's number within it."""
    rows = tl.load(line_ptr + ROWS)
    cols = tl.load(line_ptr + COLS).to(tl.int32)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    size = tl.load(line_ptr + SIZE)
    blocks = tl.load(line_ptr + BLOCKS).to(tl.int32)
    number = tl.load(line_ptr + NUMBER).to(tl.int32)
    return rows, cols, size, blocks, number


@triton.jit
def mask_of(line_ptr, ALIGNED: tl.constexpr):
    """Where a unit's mask is written."""
    return _address(line_ptr, MASK, tl.uint8, ALIGNED)


class Member(NamedTuple):
    """One tensor of a table.

    Attributes:
        pair: it, with its moments, in the linear order of its scope.
        mask: uint8, of its size.
        kept: how many each unit of scope keeps, and how many the last one.
    """

    pair: Pair
    mask: torch.Tensor
    kept: tuple[int, int]

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments; members that share them go into one table."""
        pair = self.pair
        dtype = _DTYPES[pair.tuned.dtype]
        return {**pair.constants, "DTYPE": dtype, "ALIGNED": self._aligned}

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for members that share their constants."""
        return (self.pair.tuned.dtype, self.pair.wide, self.pair.masked, self._aligned)

    @property
    def _aligned(self) -> bool:
        """Whether every vector of a row lies where a wide load can reach it."""
        pair = self.pair
        if pair.order != FLAT and pair.shape[1] % _ALIGNMENT:
            return False
        tensors = (*pair.tensors, pair.column_weight, self.mask)
        return all(part is None or part.data_ptr() % _ALIGNMENT == 0 for part in tensors)


def member(pair: Pair, mask: torch.Tensor, scope: str, density: float) -> Member:
    """A tensor with the counts of its units."""
    rows, cols = mask.shape
    unit = rows * (min(BLOCK, cols) if scope == "block" else cols)
    last = rows * ((cols - 1) % BLOCK + 1) if scope == "block" else unit
    kept = kept_count(unit, density), kept_count(last, density)
    return Member(pair, mask.view(torch.uint8), kept)


class Table:
    """The table and the map of some tensors on the device.

    Args:
        members: of equal constants.

    Attributes:
        lines: int64 ``[units, LINE]``.
        map: int64 ``[groups]``, unit of every group of tiles.
        units, groups: how many there are.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        lines: list[tuple[int, ...]] = []
        groups: list[int] = []  # of each unit
        first = 0
        for number, one in enumerate(members):
            pair = one.pair
            base, tuned = (part.data_ptr() for part in pair.tensors)
            column, affine = (
                tuned if part is None else part.data_ptr()
                for part in (pair.column_weight, pair.affine)
            )
            sizes = (*pair.shape, pair.tuned.numel(), pair.blocks)
            fixed = (base, tuned, column, affine, one.mask.data_ptr(), *sizes)
            tiles, units = pair.tiles, pair.units
            for unit in range(units):
                kept = one.kept[unit == units - 1]
                lines.append((*fixed, unit, kept, tiles, first, number, 0, 0))
                groups.append(ceil_div(tiles, GROUP.value))
                first += groups[-1] * GROUP.value
        units_of_groups = torch.arange(len(lines)).repeat_interleave(torch.tensor(groups))
        words = torch.cat([torch.tensor(lines).flatten(), units_of_groups])
        device = members[0].mask.device
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        self.units, self.groups = len(lines), len(units_of_groups)
        self.lines, self.map = words.split([len(lines) * LINE.value, self.groups])
