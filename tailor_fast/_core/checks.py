"""Input checks of the public functions: one place, one message format.

``op: name must be EXPECTED; got GOT. Hint: REMEDY`` - a wrong kind of object or dtype is a
``TypeError``, everything else a ``ValueError``. Nothing is copied to make an input fit.
"""

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = (torch.float32,)
BOOL = (torch.bool,)


def describe(value: object) -> str:
    """``[64, 256] float32 on cpu`` for a tensor, the type's name for anything else."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{list(value.shape)} {dtype} on {value.device}"


def fail(
    op: str,
    name: str,
    expected: str,
    got: str,
    hint: str = "",
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``error`` in the house's format."""
    remedy = f". Hint: {hint}" if hint else ""
    raise error(f"{op}: {name} must be {expected}; got {got}{remedy}")


def check_tensor(
    op: str,
    name: str,
    value: Any,
    shape: Sequence[str | int] | None,
    dtypes: Collection[torch.dtype],
    dims: dict[str, int] | None = None,
    like: torch.Tensor | None = None,
) -> None:
    """Check one tensor argument.

    Args:
        op: public function's name, first word of the message.
        name: argument's name.
        value: what the caller passed.
        shape: one entry per dimension, an exact size or a name; equal names must have equal sizes
            across the arguments that share ``dims``. None accepts any shape.
        dtypes: accepted dtypes.
        dims: sizes of the named dimensions so far; filled in.
        like: tensor whose device this one must be on.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: wrong rank, size, device, stride, or it requires grad.
    """
    accepted = "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"a {accepted} tensor"
    if shape is not None:
        expected = f"{accepted} [{', '.join(str(size) for size in shape)}]"
    if not isinstance(value, torch.Tensor):
        fail(op, name, expected, describe(value), error=TypeError)
    got = describe(value)
    if value.dtype not in dtypes:
        hint = f"{name}.to(torch.{accepted.split('/')[0]})"
        fail(op, name, expected, got, hint, error=TypeError)
    if shape is not None:
        _check_shape(op, name, value, shape, {} if dims is None else dims, expected)
    if like is not None and value.device != like.device:
        fail(op, name, f"on {like.device}", got, f"{name}.to({str(like.device)!r})")
    if not value.is_contiguous():
        got = f"strides {tuple(value.stride())} for shape {list(value.shape)}"
        fail(op, name, "contiguous", got, f"{name}.contiguous() makes a copy")
    if value.requires_grad:
        fail(op, name, "without requires_grad", got, f"{name}.detach()")


def _check_shape(
    op: str,
    name: str,
    value: torch.Tensor,
    shape: Sequence[str | int],
    dims: dict[str, int],
    expected: str,
) -> None:
    if value.dim() != len(shape):
        flattens = value.dim() > len(shape) and shape and isinstance(shape[0], str)
        hint = f"{name}.reshape({', '.join(['-1'] + ['...'] * (len(shape) - 1))})"
        fail(op, name, expected, describe(value), hint if flattens else "")
    for axis, (size, want) in enumerate(zip(value.shape, shape, strict=True)):
        known = want if isinstance(want, int) else dims.setdefault(want, size)
        if size != known:
            where = f"size {known} in dimension {axis}"
            named = f" ({want} of an earlier argument)" if isinstance(want, str) else ""
            fail(op, name, f"{expected} with {where}{named}", describe(value))


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Check that a string option is one of ``choices``."""
    if value not in choices:
        fail(op, name, f"one of {', '.join(choices)}", repr(value))


def check_range(
    op: str, name: str, value: Any, low: float, high: float, *, whole: bool = False
) -> None:
    """Check a number against a closed range; ``bool`` is not a number here."""
    kind = int if whole else (int, float)
    expected = f"{'an integer' if whole else 'a number'} in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, kind):
        fail(op, name, expected, f"{type(value).__name__} {value!r}", error=TypeError)
    if not low <= value <= high:
        fail(op, name, expected, repr(value))
