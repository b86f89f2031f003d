"""Products of float32 matrices on the CPU, added into place: where the native backends get theirs.

They are torch's, with one exception: the kernels of ``csrc/gemm``, where they are known to win.
That is AVX-512 on a CPU that is not Intel's under a torch that multiplies with MKL, which leaves
the AVX-512 of other makes unused: 4096 x 4096 x 4096 on two Zen 5 cores takes MKL 0.72 s and
these kernels 0.39 s (``benchmarks/cpu_gram.py`` times both). There they also give the same bits at
any number of threads. CPU and torch decide, once; the choice is logged.
"""

import functools
import logging

import torch

from tailor_fast import _C

_log = logging.getLogger("tailor_fast")

_PANEL = 512  # columns of torch's GEMMs where one triangle is asked for


@functools.cache
def has_kernels() -> bool:
    """Whether products go through the kernels of the extension."""
    unused = _C.instruction_sets()[-1] == "avx512" and not _C.made_by_intel()
    found = unused and torch.backends.mkl.is_available()
    _log.debug("float32 products on cpu: %s", "the extension's" if found else "torch's")
    return found


def add_product_(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
    lower: bool = False,
) -> torch.Tensor:
    """``out += scale * a @ b``, added once per sum of 384 products.

    Args:
        out: ``[rows, cols]``, its rows contiguous, in memory apart from ``a`` and ``b``.
        a: ``[rows, depth]`` of the same dtype, any strides.
        b: ``[depth, cols]``, same.
        scale: factor of the product.
        lower: only entries on and below the diagonal are asked for; others may be changed.

    Returns:
        ``out``. Other dtypes than float32 go through torch.
    """
    if out.dtype == torch.float32 and has_kernels():
        _multiply(out, a, b, scale, accumulate=True, lower=lower)
    elif lower:
        for start in range(0, out.shape[1], _PANEL):
            cols = slice(start, start + _PANEL)
            out[start:, cols].addmm_(a[start:], b[:, cols], alpha=scale)
    else:
        out.addmm_(a, b, alpha=scale)
    return out


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for ``a [rows, depth]`` and ``b [depth, cols]`` of one dtype, any strides."""
    if a.dtype != torch.float32 or a.shape[1] == 0 or not has_kernels():
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    _multiply(out, a, b, 1.0, accumulate=False, lower=False)
    return out


def _multiply(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    *,
    accumulate: bool,
    lower: bool,
) -> None:
    _C.gemm(
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        b.data_ptr(),
        b.stride(0),
        b.stride(1),
        out.data_ptr(),
        out.stride(0),
        out.shape[0],
        out.shape[1],
        a.shape[1],
        scale,
        accumulate,
        lower,
        torch.get_num_threads(),
    )
