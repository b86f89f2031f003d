"""What the ``gram`` op refuses, and what it says."""

import pytest
import torch

from tailor_fast._core.backend import BackendUnavailableError
from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)

X = torch.ones(6, 4)
MASK = torch.ones(6, dtype=torch.bool)
FLOATS = "float32/bfloat16/float16"


def full(x=X, gram=None, mask=None):
    return accumulate_gram_(torch.zeros(4, 4) if gram is None else gram, x, token_mask=mask)


def cross(x=X, y=X, out=None, mask=None):
    return accumulate_cross_gram_(torch.zeros(4, 4) if out is None else out, x, y, token_mask=mask)


def diag(x=X, out=None, mask=None):
    return accumulate_gram_diag_(torch.zeros(4) if out is None else out, x, token_mask=mask)


CASES = [
    (
        lambda: full(x=[1.0]),
        TypeError,
        f"accumulate_gram_: x must be {FLOATS} [tokens, cols]; got list",
    ),
    (
        lambda: full(x=X.double()),
        TypeError,
        f"accumulate_gram_: x must be {FLOATS} [tokens, cols]; "
        "got [6, 4] float64 on cpu. Hint: x.to(torch.float32)",
    ),
    (
        lambda: full(x=torch.ones(2, 3, 4)),
        ValueError,
        f"accumulate_gram_: x must be {FLOATS} [tokens, cols]; "
        "got [2, 3, 4] float32 on cpu. Hint: x.reshape(-1, ...)",
    ),
    (
        lambda: full(x=torch.ones(4, 6).T),
        ValueError,
        "accumulate_gram_: x must be contiguous; got strides (1, 6) for shape [6, 4]. "
        "Hint: x.contiguous() makes a copy",
    ),
    (
        lambda: full(x=torch.ones(6, 4, requires_grad=True)),
        ValueError,
        "accumulate_gram_: x must be without requires_grad; "
        "got [6, 4] float32 on cpu. Hint: x.detach()",
    ),
    (
        lambda: full(gram=torch.zeros(4, 4, dtype=torch.bfloat16)),
        TypeError,
        "accumulate_gram_: gram must be float32 [cols, cols]; "
        "got [4, 4] bfloat16 on cpu. Hint: gram.to(torch.float32)",
    ),
    (
        lambda: full(gram=torch.zeros(4, 5)),
        ValueError,
        "accumulate_gram_: gram must be float32 [cols, cols] with size 4 in dimension 1 "
        "(cols of an earlier argument); got [4, 5] float32 on cpu",
    ),
    (
        lambda: full(gram=torch.zeros(4)),
        ValueError,
        "accumulate_gram_: gram must be float32 [cols, cols]; got [4] float32 on cpu",
    ),
    (
        lambda: full(gram=torch.zeros(4, 4, device="meta")),
        ValueError,
        "accumulate_gram_: gram must be on cpu; got [4, 4] float32 on meta. Hint: gram.to('cpu')",
    ),
    (
        lambda: full(mask=MASK.byte()),
        TypeError,
        "accumulate_gram_: token_mask must be bool [tokens]; "
        "got [6] uint8 on cpu. Hint: token_mask.to(torch.bool)",
    ),
    (
        lambda: full(mask=MASK[:5]),
        ValueError,
        "accumulate_gram_: token_mask must be bool [tokens] with size 6 in dimension 0 "
        "(tokens of an earlier argument); got [5] bool on cpu",
    ),
    (
        lambda: full(mask=MASK[:, None]),
        ValueError,
        "accumulate_gram_: token_mask must be bool [tokens]; "
        "got [6, 1] bool on cpu. Hint: token_mask.reshape(-1)",
    ),
    (
        lambda: cross(y=torch.ones(5, 4)),
        ValueError,
        f"accumulate_cross_gram_: y must be {FLOATS} [tokens, y_cols] with size 6 in dimension 0 "
        "(tokens of an earlier argument); got [5, 4] float32 on cpu",
    ),
    (
        lambda: cross(y=X.int()),
        TypeError,
        f"accumulate_cross_gram_: y must be {FLOATS} [tokens, y_cols]; "
        "got [6, 4] int32 on cpu. Hint: y.to(torch.float32)",
    ),
    (
        lambda: cross(out=torch.zeros(3, 4)),
        ValueError,
        "accumulate_cross_gram_: cross must be float32 [x_cols, y_cols] with size 4 in dimension 0 "
        "(x_cols of an earlier argument); got [3, 4] float32 on cpu",
    ),
    (
        lambda: cross(mask=MASK[:1]),
        ValueError,
        "accumulate_cross_gram_: token_mask must be bool [tokens] with size 6 in dimension 0 "
        "(tokens of an earlier argument); got [1] bool on cpu",
    ),
    (
        lambda: diag(out=torch.zeros(5)),
        ValueError,
        "accumulate_gram_diag_: diag must be float32 [cols] with size 4 in dimension 0 "
        "(cols of an earlier argument); got [5] float32 on cpu",
    ),
    (
        lambda: diag(x=X.half()[0]),
        ValueError,
        f"accumulate_gram_diag_: x must be {FLOATS} [tokens, cols]; got [4] float16 on cpu",
    ),
    (
        lambda: diag(mask=[True] * 6),
        TypeError,
        "accumulate_gram_diag_: token_mask must be bool [tokens]; got list",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:60] for case in CASES])
def test_message(call, error, message) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_refusals_leave_the_sum_alone() -> None:
    gram = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="token_mask"):
        full(gram=gram, mask=MASK[:5])
    assert not bool(gram.any())


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (accumulate_gram_, (torch.zeros(4, 4), X)),
        (accumulate_cross_gram_, (torch.zeros(4, 4), X, X)),
        (accumulate_gram_diag_, (torch.zeros(4), X)),
    ],
)
def test_backend_that_is_not_there(function, arguments) -> None:
    with pytest.raises(ValueError, match=r"^gram: backend must be one of auto, .*; got 'fast'$"):
        function(*arguments, backend="fast")
    with pytest.raises(BackendUnavailableError, match=r"^gram: backend 'cuda' is not implemented"):
        function(*arguments, backend="cuda")
    assert not bool(arguments[0].any())
