"""Products of float32 matrices: every shape and stride against float64, with each provider."""

import functools
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tailor_fast.testing import assert_within
from tests.backends import KERNELS, needs_native, on_kernels

pytestmark = needs_native
gemm = pytest.importorskip("tailor_fast.ops.gemm")

# Edges of the tiles (6 or 12 rows, 8 to 32 columns), of the depth (384), of a task (240 rows, 512
# columns) and of what is packed at a time (4096).
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (12, 32, 384),
    (13, 33, 385),
    (100, 333, 257),
    (241, 513, 40),
    (4099, 9, 20),
    (9, 4100, 390),
]


@pytest.fixture(params=KERNELS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set, or torch in their place."""
    yield from on_kernels(request.param)


def drawn(rows: int, cols: int, layout: str, seed: int) -> torch.Tensor:
    """Matrix ``[rows, cols]`` whose rows or columns are contiguous, or neither."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(cols, rows, generator=generator).T
    if layout == "neither":
        return torch.randn(2 * rows, 3 * cols, generator=generator)[::2, ::3]
    return torch.randn(rows, cols + 5, generator=generator)[:, 2 : cols + 2]


@pytest.mark.parametrize("layouts", [("rows", "columns"), ("columns", "rows"), ("neither",) * 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int], layouts: tuple[str, str], provider: str) -> None:
    rows, cols, depth = shape
    a, b = drawn(rows, depth, layouts[0], 1), drawn(depth, cols, layouts[1], 2)
    exact, plain = a.double() @ b.double(), a @ b
    assert_within(gemm.product(a, b), exact, plain)
    around = torch.randn(rows + 2, cols + 2, generator=torch.Generator().manual_seed(3))
    before = around.clone()
    out = around[1:-1, 1:-1]
    for scale in (1.0, -1.0, 2.0):
        out.copy_(before[1:-1, 1:-1])
        start = out.clone()
        assert gemm.add_product_(out, a, b, scale=scale) is out
        assert_within(out, start.double() + scale * exact, start + scale * plain)
    around[1:-1, 1:-1] = before[1:-1, 1:-1]
    assert torch.equal(around, before)  # nothing beside the result was touched


@pytest.mark.parametrize("size", [1, 31, 300, 1100])
def test_the_lower_triangle(size: int, provider: str) -> None:
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(size))
    out = gemm.add_product_(torch.ones(size, size), x.T, x, lower=True)
    exact = 1 + x.double().T @ x.double()
    assert_within(out.tril(), exact.tril(), (1 + x.T @ x).tril())


def test_half_the_work_is_left_out(provider: str) -> None:
    """Far above the diagonal nothing is computed: what stands there stays."""
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    out = gemm.add_product_(torch.zeros(2000, 2000), x.T, x, lower=True)
    assert int((out != 0).sum()) < 0.7 * out.numel()


def test_same_bits_at_any_number_of_threads(provider: str, set_num_threads) -> None:
    if provider == "torch":
        pytest.skip("torch promises no such thing")
    a, b = drawn(700, 800, "rows", 4), drawn(800, 600, "columns", 5)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(gemm.product(a, b))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_values_that_are_not_finite_spread_as_in_torch(provider: str) -> None:
    a, b = torch.zeros(20, 40), torch.ones(40, 50)
    a[3, 5], a[7, 2], b[2, 9] = torch.nan, torch.inf, 0.0
    torch.testing.assert_close(gemm.product(a, b), a @ b, rtol=0, atol=0, equal_nan=True)


def test_unaligned_matrices(provider: str) -> None:
    memory = torch.empty(4 * 30 * 40 + 1, dtype=torch.uint8)
    odd = memory[1:].view(torch.uint8)
    a = torch.randn(30, 40, generator=torch.Generator().manual_seed(6))
    odd.copy_(a.view(torch.uint8).flatten())
    moved = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1).view(30, 40)
    assert moved.data_ptr() % 4 == 1
    assert torch.equal(gemm.product(moved, a.T), gemm.product(a, a.T))


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_multiply(shape: tuple[int, int, int], provider: str) -> None:
    rows, cols, depth = shape
    a, b = torch.ones(rows, depth), torch.ones(depth, cols)
    assert torch.equal(gemm.product(a, b), a @ b)
    out = gemm.add_product_(torch.ones(rows, cols), a, b)
    assert torch.equal(out, torch.ones(rows, cols))


def test_float64_goes_through_torch(provider: str) -> None:
    a = drawn(30, 20, "rows", 7).double()
    assert torch.equal(gemm.product(a, a.T), a @ a.T)
    out = torch.ones(30, 30, dtype=torch.float64)
    assert torch.equal(
        gemm.add_product_(out.clone(), a, a.T, scale=2.0), out.addmm(a, a.T, alpha=2)
    )


@pytest.mark.parametrize(
    ("fastest", "intel", "mkl", "expected"),
    [
        ("avx512", False, True, True),
        ("avx512", True, True, False),  # there MKL uses all of the CPU
        ("avx512", False, False, False),
        ("avx2", False, True, False),  # and there nobody has more
        ("portable", False, False, False),
    ],
)
def test_who_multiplies(
    monkeypatch, caplog, fastest: str, intel: bool, mkl: bool, expected: bool
) -> None:
    monkeypatch.setattr(gemm._C, "instruction_sets", lambda: ["portable", fastest])
    monkeypatch.setattr(gemm._C, "made_by_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    choose = functools.cache(gemm.has_kernels.__wrapped__)
    with caplog.at_level(logging.DEBUG, logger="tailor_fast"):
        assert [choose() for _ in range(2)] == [expected] * 2
    name = "the extension's" if expected else "torch's"
    assert [record.getMessage() for record in caplog.records] == [
        f"float32 products on cpu: {name}"
    ]


def test_this_cpu_has_its_maker() -> None:
    cpus = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpus.is_file():
        pytest.skip("no x86 CPU that Linux describes")
    assert gemm._C.made_by_intel() == ("GenuineIntel" in cpus.read_text())
