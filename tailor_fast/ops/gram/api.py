"""Public functions of the ``gram`` op: checks, then one dispatch line each."""

import torch

from tailor_fast._core.backend import Backend
from tailor_fast._core.checks import BOOL, FLOAT32, FLOATS, check_tensor
from tailor_fast.ops.gram import schema as _schema  # noqa: F401  registers the ops

_OPS = torch.ops.tailor_fast


def _check_mask(op: str, token_mask: object, x: torch.Tensor, dims: dict[str, int]) -> None:
    if token_mask is not None:
        check_tensor(op, "token_mask", token_mask, ("tokens",), BOOL, dims, like=x)


def accumulate_gram_(
    gram: torch.Tensor,
    x: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Add the sum of ``x_t x_t^T`` over the counted tokens to ``gram``, in place.

    The caller keeps the number of counted tokens; the mean Gram of the method is ``gram / tokens``.
    The result is exactly symmetric and bit-equal from run to run at one thread count.

    Args:
        gram: symmetric sum so far, float32 ``[cols, cols]``, of which only the lower triangle is
            read; changed in place.
        x: layer inputs, float32/bfloat16/float16 ``[tokens, cols]``.
        token_mask: bool ``[tokens]``, True where a token counts. None counts all.
        backend: see ``tailor_fast.backends()``.

    Returns:
        ``gram``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong shape, device or stride, or an input that requires grad.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "accumulate_gram_"
    dims: dict[str, int] = {}
    check_tensor(op, "x", x, ("tokens", "cols"), FLOATS, dims)
    check_tensor(op, "gram", gram, ("cols", "cols"), FLOAT32, dims, like=x)
    _check_mask(op, token_mask, x, dims)
    _OPS.accumulate_gram_(gram, x, token_mask, backend)
    return gram


def accumulate_cross_gram_(
    cross: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Add the sum of ``x_t y_t^T`` over the counted tokens to ``cross``, in place.

    Args:
        cross: sum so far, float32 ``[x_cols, y_cols]``; changed in place.
        x: float32/bfloat16/float16 ``[tokens, x_cols]``.
        y: float32/bfloat16/float16 ``[tokens, y_cols]``, token for token beside ``x``.
        token_mask: bool ``[tokens]``, True where a token counts. None counts all.
        backend: see ``tailor_fast.backends()``.

    Returns:
        ``cross``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong shape, device or stride, or an input that requires grad.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "accumulate_cross_gram_"
    dims: dict[str, int] = {}
    check_tensor(op, "x", x, ("tokens", "x_cols"), FLOATS, dims)
    check_tensor(op, "y", y, ("tokens", "y_cols"), FLOATS, dims, like=x)
    check_tensor(op, "cross", cross, ("x_cols", "y_cols"), FLOAT32, dims, like=x)
    _check_mask(op, token_mask, x, dims)
    _OPS.accumulate_cross_gram_(cross, x, y, token_mask, backend)
    return cross


def accumulate_gram_diag_(
    diag: torch.Tensor,
    x: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Add the sum of ``x_t * x_t`` over the counted tokens to ``diag``, in place.

    Args:
        diag: sum so far, float32 ``[cols]``; changed in place.
        x: layer inputs, float32/bfloat16/float16 ``[tokens, cols]``.
        token_mask: bool ``[tokens]``, True where a token counts. None counts all.
        backend: see ``tailor_fast.backends()``.

    Returns:
        ``diag``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong shape, device or stride, or an input that requires grad.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "accumulate_gram_diag_"
    dims: dict[str, int] = {}
    check_tensor(op, "x", x, ("tokens", "cols"), FLOATS, dims)
    check_tensor(op, "diag", diag, ("cols",), FLOAT32, dims, like=x)
    _check_mask(op, token_mask, x, dims)
    _OPS.accumulate_gram_diag_(diag, x, token_mask, backend)
    return diag
