"""The least time that a piece of work can take: what it must move and compute, over a card's rates.

Bytes are counted once: each input is read once and each output written once. Operations are those
of the method, a multiplication and an addition each counting as one, and are charged to the unit
that does them.
"""

from typing import Literal, NamedTuple

Unit = Literal["bf16", "tf32", "fp32"]
SECTOR = 32  # bytes that the memory moves at least
OPERATIONS = 2  # multiply and add


class Cost(NamedTuple):
    """What a piece of work must move and compute.

    Attributes:
        bytes: read and written in device memory.
        flops: operations.
        unit: which unit does them.
    """

    bytes: int
    flops: int = 0
    unit: Unit = "fp32"

    def __add__(self, other: object) -> "Cost":
        """Both, one after the other, by the same unit."""
        if not isinstance(other, Cost):
            return NotImplemented
        if self.flops and other.flops and self.unit != other.unit:
            raise ValueError(f"costs of {self.unit} and {other.unit} cannot be added")
        unit = self.unit if self.flops else other.unit
        return Cost(self.bytes + other.bytes, self.flops + other.flops, unit)


class Ceilings(NamedTuple):
    """What a card can do: bytes per second of a copy (read and written), operations per second."""

    name: str
    copy: float
    bf16: float
    tf32: float
    fp32: float

    def floor(self, cost: Cost) -> float:
        """Least seconds for ``cost``: moving and computing overlap."""
        rate: float = getattr(self, cost.unit)
        return max(cost.bytes / self.copy, cost.flops / rate)


# Rates that such cards reach with a library's copy and matrix products, not those of the datasheet.
CARDS = (
    Ceilings("H200", copy=4.3e12, bf16=790e12, tf32=400e12, fp32=60e12),
    Ceilings("H100", copy=3.0e12, bf16=790e12, tf32=400e12, fp32=60e12),
)


def select(weights: int, item: int, scored_columns: int = 0) -> Cost:
    """One read of a pair, one bool per weight written; ``scored_columns`` is the vector's size."""
    return Cost(weights * (2 * item + 1) + 4 * scored_columns)


def topk(scores: int, item: int) -> Cost:
    """One read of the scores, one bool per score written."""
    return Cost(scores * (item + 1))


def gram(tokens: int, cols: int, item: int) -> Cost:
    """One triangle of ``x^T x`` added to a sum: one triangle of it is read, both are written."""
    triangle = cols * (cols + 1) // 2
    moved = tokens * cols * item + 4 * (triangle + cols * cols)
    return Cost(moved, OPERATIONS * tokens * triangle, "bf16" if item == 2 else "tf32")


def cross_gram(tokens: int, cols: int, other: int, item: int) -> Cost:
    """``x^T y`` added to a sum that is read and written."""
    moved = tokens * (cols + other) * item + 8 * cols * other
    flops = OPERATIONS * tokens * cols * other
    return Cost(moved, flops, "bf16" if item == 2 else "tf32")


def gram_diag(tokens: int, cols: int, item: int) -> Cost:
    """One read of the inputs."""
    return Cost(tokens * cols * item + 8 * cols)


def decorate_exact(rows: int, cols: int, iterations: int) -> Cost:
    """Masked conjugate gradients: the right-hand side, then one product with the Gram per step."""
    moved = 4 * cols * cols + rows * cols * (4 + 1 + 4)
    return Cost(moved, OPERATIONS * rows * cols * cols * (iterations + 1), "tf32")


def sweep(rows: int, cols: int) -> Cost:
    """The column sweep: each error moves the columns to its right, half of a full product.

    Three TF32 products stand for one of float32 accuracy.
    """
    moved = 4 * cols * cols + rows * cols * (4 + 1 + 4)
    return Cost(moved, 3 * rows * cols * cols, "tf32")


def factor(cols: int) -> Cost:
    """One Cholesky factorisation in float32; no inverse is formed."""
    return Cost(8 * cols * cols, cols**3 // 3, "fp32")


def encode(words: int, item: int, kept: int) -> Cost:
    """A pair read; mask bits, kept words and block counts written."""
    return Cost(2 * words * item + _patch_bytes(words, item, kept))


def apply(words: int, item: int, kept: int) -> Cost:
    """A patch read; of the target, the sectors that hold a kept word are read and written.

    Kept words lie where they fall: a sector of ``s`` words is spared with ``(1 - kept / words)^s``.
    """
    touched = 1.0 - (1.0 - kept / words) ** (SECTOR // item)
    return Cost(_patch_bytes(words, item, kept) + round(2 * words * item * touched))


def _patch_bytes(words: int, item: int, kept: int) -> int:
    return -(-words // 8) + kept * item + 4 * -(-words // 65536)
