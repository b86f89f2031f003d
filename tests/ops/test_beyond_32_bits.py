"""Places past 2^31 elements: kernels of all ops use 64 bits.

What is not touched costs no memory: an array of zeros has one page behind all of its addresses, and
one whose words matter little has one piece of memory behind all but its first and last piece.
"""

import ctypes
import itertools
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tailor_fast.testing import assert_within
from tests.backends import KERNELS, needs_native, on_kernels

pytestmark = needs_native
extension = pytest.importorskip("tailor_fast._C")
codec = pytest.importorskip("tailor_fast.ops.codec.native")
exact = pytest.importorskip("tailor_fast.ops.decorate.native.exact")
gram = pytest.importorskip("tailor_fast.ops.gram.native")
select = pytest.importorskip("tailor_fast.ops.select.native")

FAR = 2**31 + 64  # elements between two rows
PIECE = 1 << 22  # bytes
_NORESERVE, _FIXED, _POPULATE = 0x4000, 0x10, 0x8000  # of Linux; Python 3.11 names no such


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_kernels(request.param)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_of_tokens_that_lie_far(kernels: str, dtype: torch.dtype) -> None:
    tokens, cols = 2**21 + 5, 1024
    x = zeros(tokens, cols, dtype=dtype)
    counted = torch.zeros(tokens, dtype=torch.bool)
    last = torch.randn(3, cols).to(dtype)
    x[-3:] = last
    counted[[7, tokens - 3, tokens - 2, tokens - 1]] = True
    ours, diagonal = torch.zeros(cols, cols), torch.zeros(cols)
    gram.accumulate_gram_(ours, x, counted)
    gram.accumulate_gram_diag_(diagonal, x, counted)
    best, plain = last.double().T @ last.double(), last.float().T @ last.float()
    assert_within(ours, best, plain)
    assert_within(diagonal, best.diagonal(), plain.diagonal())


def test_products_of_rows_that_lie_far(kernels: str) -> None:
    a, b, c = (zeros(2 * FAR).as_strided(size, (FAR, 1)) for size in ((2, 9), (2, 70), (2, 70)))
    left, right, before = torch.randn(2, 9), torch.randn(2, 70), torch.randn(2, 70)
    for far, near in ((a, left), (b, right), (c, before)):
        far.copy_(near)

    def multiply(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        sizes = (len(x), y.shape[1], x.shape[1])
        places = ((t.data_ptr(), *t.stride()) for t in (x, y))
        extension.gemm(
            *itertools.chain(*places), out.data_ptr(), out.stride(0), *sizes, 1.0, True, False, 2
        )

    ours = before.clone()
    multiply(left[:, :2], right, ours)
    multiply(a[:, :2], b, c)
    assert torch.equal(c, ours)
    assert not torch.equal(c, before)
    ours = torch.zeros(9, 70)
    multiply(left.T, right, ours)  # depth that lies far
    far = torch.zeros(9, 70)
    multiply(a.T, b, far)
    assert torch.equal(far, ours)


def test_sweep_of_rows_that_lie_far(kernels: str) -> None:
    width = 48
    factor = torch.eye(width) + 0.1 * torch.randn(width, width).triu(1)
    diagonal, signed = factor.diagonal().clone(), -factor.triu(1)
    weight, target = torch.randn(2, width), torch.randn(2, width)
    mask = torch.rand(2, width) < 0.5

    def sweep(*tensors: torch.Tensor) -> None:
        places = [(t.data_ptr(), t.stride(0)) for t in tensors]
        extension.decorate_sweep(
            *itertools.chain(*places[:3]),
            signed.data_ptr(),
            diagonal.data_ptr(),
            *places[3],
            2,
            width,
            0,
            width,
            1,
        )

    near = [weight.clone(), mask, target, torch.zeros(2, width)]
    far = [zeros(2 * FAR, dtype=t.dtype).as_strided(t.shape, (FAR, 1)).copy_(t) for t in near]
    sweep(*near)
    sweep(*far)
    assert not torch.equal(near[0], weight)
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("right_side", [False, True])
def test_exact_solve_on_the_far_end_of_a_gram(kernels: str, right_side: bool) -> None:
    cols, some = 46_400, [3, 46_000, 46_350, 46_399]  # the Gram has more than 2^31 elements
    whole = zeros(cols, cols)
    x = torch.randn(20, len(some))
    part = x.T @ x / 20
    for i, row in enumerate(some):
        whole[row, some] = part[i]
    delta, mask = torch.zeros(1, cols), torch.zeros(1, cols, dtype=torch.bool)
    delta[0, some] = torch.randn(len(some))
    mask[0, some[1:]] = True
    rhs = torch.zeros(1, cols)
    rhs[0, some] = torch.randn(len(some))
    patch, stats = torch.full((1, cols), 7.0), torch.empty(1, 4, dtype=torch.float64)
    places = (t.data_ptr() for t in (delta, mask))
    sides = (rhs.data_ptr() if right_side else 0, whole.data_ptr())
    options = (1, cols, 0.1, 1e-12, 1000)
    extension.decorate_exact(*places, *sides, *options, patch.data_ptr(), stats.data_ptr(), 1)

    def solved(dtype: torch.dtype) -> torch.Tensor:
        a = part.to(dtype) + 0.1 * torch.eye(len(some), dtype=dtype)
        d = delta[0, some].to(dtype)
        b = rhs[0, some].to(dtype) + 0.1 * d if right_side else a @ d
        return torch.linalg.solve(a[1:, 1:], b[1:])

    assert_within(patch[0, some[1:]], solved(torch.float64), solved(torch.float32))
    assert int(patch.count_nonzero()) == len(some) - 1


def repeated(size: int, dtype: torch.dtype) -> torch.Tensor:
    """An array of ``size`` elements that repeats one piece of memory between its two ends."""
    pieces = -(-size * dtype.itemsize // PIECE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.memfd_create("pieces")
    os.truncate(file, 3 * PIECE)
    whole = zeros(pieces * PIECE // dtype.itemsize, dtype=dtype)
    for piece in range(pieces):
        place = 0 if piece == 0 else 2 if piece == pieces - 1 else 1
        address = whole.data_ptr() + piece * PIECE
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED | _POPULATE
        if libc.mmap(address, PIECE, access, flags, file, place * PIECE) != address:
            raise OSError(ctypes.get_errno(), "mmap")
    os.close(file)
    return whole[:size]


def select_far() -> tuple[int, list[int], int]:
    """Passes, marks in the first and last row, and the fault found, with 2^31 deltas and more.

    All deltas are 1 but two of the first and two of the last ones, which are 2; then one is NaN.
    """
    torch.set_num_threads(2)
    rows, cols = 2**10 + 1, PIECE // 2  # a row of bfloat16 is a piece, of the mask half of one
    size, last = rows * cols, (rows - 1) * cols
    base, tuned = repeated(size, torch.bfloat16), repeated(size, torch.bfloat16)
    mask = repeated(size, torch.bool)
    for row in (0, 1, rows - 1):
        tuned[row * cols : (row + 1) * cols] = 1
    tuned[[1, cols - 1, last, size - 1]] = 2
    pair = (base.data_ptr(), tuned.data_ptr(), 0, rows, cols, 1, select._SALIENCE, 1.0, 0, 0)
    options = ((rows, cols), (7, 7), select.Tuning())  # the unit of scope; 7 are kept
    marked, _, work = select._run(pair, mask, *options)
    marks = [int(i) for i in marked[:cols].nonzero()]
    marks += [last + int(i) for i in marked[last:].nonzero()]
    tuned[size - 5] = float("nan")
    _, fault, _ = select._run(pair, mask, *options)
    return work.passes, marks, fault[0]


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a page counts in its peak memory as often as it is mapped."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_selection_among_more_than_2_to_the_31(apart: ProcessPoolExecutor) -> None:
    passes, marks, fault = apart.submit(select_far).result()
    cols, size = PIECE // 2, (2**10 + 1) * PIECE // 2
    assert passes == 1
    # Ties go to the lowest indices.
    assert marks == [0, 1, 2, 3, cols - 1, size - cols, size - 1]
    assert fault == size - 5


def patch_far() -> tuple[list[int], list[int], list[list[int]]]:
    """Places and words of a patch of 2^31 bytes and more; the bytes with it, and without again."""
    torch.set_num_threads(2)
    size = 2**31 + PIECE + 100_000
    places = [0, 9, size - 70_000, size - 2, size - 1]  # in the first and the last piece
    base, tuned = repeated(size, torch.int8), repeated(size, torch.int8)
    base[places] = torch.tensor([5, 5, 5, 5, 0], dtype=torch.int8)
    tuned[places] = torch.tensor([1, 5, 4, 7, -1], dtype=torch.int8)
    bits, words, blocks = codec.encode_patch(base, tuned, None)
    some = bits.nonzero().flatten()
    found = [8 * int(i) + bit for i in some for bit in range(8) if int(bits[i]) >> bit & 1]
    seen = []
    for _ in range(2):
        codec.apply_patch_(base, bits, words, blocks)
        seen.append(base[places].tolist())
    return found, words.tolist(), seen


def test_a_patch_of_more_than_2_to_the_31(apart: ProcessPoolExecutor) -> None:
    found, words, seen = apart.submit(patch_far).result()
    size = 2**31 + PIECE + 100_000
    assert found == [0, size - 70_000, size - 2, size - 1]
    assert words == [5 ^ 1, 5 ^ 4, 5 ^ 7, -1]
    assert seen == [[1, 5, 4, 7, -1], [5, 5, 5, 5, 0]]
