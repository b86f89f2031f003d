"""Input checks: every refusal with its whole message."""

import pytest
import torch

from tailor_fast._core.checks import (
    BOOL,
    FLOATS,
    check_choice,
    check_range,
    check_tensor,
    describe,
    fail,
)

WEIGHT = torch.ones(4, 3)


def test_describe() -> None:
    assert describe(WEIGHT) == "[4, 3] float32 on cpu"
    assert describe(torch.ones((), dtype=torch.bfloat16, device="meta")) == "[] bfloat16 on meta"
    assert describe([1]) == "list"
    assert describe(None) == "NoneType"


def test_fail() -> None:
    with pytest.raises(ValueError, match="op") as caught:
        fail("op", "x", "3", "4")
    assert str(caught.value) == "op: x must be 3; got 4"
    with pytest.raises(KeyError) as key:
        fail("op", "x", "3", "4", "try 3", error=KeyError)
    assert key.value.args == ("op: x must be 3; got 4. Hint: try 3",)


def test_good_tensors_pass() -> None:
    dims: dict[str, int] = {}
    check_tensor("op", "w", WEIGHT, ("rows", "cols"), FLOATS, dims)
    check_tensor("op", "b", torch.ones(4), ("rows",), FLOATS, dims, like=WEIGHT)
    check_tensor("op", "e", torch.ones(0, 4), (0, 4), FLOATS)
    check_tensor("op", "s", torch.ones(()), (), FLOATS)
    check_tensor("op", "any", torch.ones(1, 2, 3), None, FLOATS)
    assert dims == {"rows": 4, "cols": 3}


TENSORS = [
    (
        {"value": 3.0},
        TypeError,
        "op: w must be float32/bfloat16/float16 [rows, cols]; got float",
    ),
    (
        {"value": 3.0, "shape": None},
        TypeError,
        "op: w must be a float32/bfloat16/float16 tensor; got float",
    ),
    (
        {"value": WEIGHT.int()},
        TypeError,
        "op: w must be float32/bfloat16/float16 [rows, cols]; "
        "got [4, 3] int32 on cpu. Hint: w.to(torch.float32)",
    ),
    (
        {"value": WEIGHT, "dtypes": BOOL},
        TypeError,
        "op: w must be bool [rows, cols]; got [4, 3] float32 on cpu. Hint: w.to(torch.bool)",
    ),
    (
        {"value": torch.ones(2, 4, 3)},
        ValueError,
        "op: w must be float32/bfloat16/float16 [rows, cols]; "
        "got [2, 4, 3] float32 on cpu. Hint: w.reshape(-1, ...)",
    ),
    (
        {"value": torch.ones(4)},
        ValueError,
        "op: w must be float32/bfloat16/float16 [rows, cols]; got [4] float32 on cpu",
    ),
    (
        {"value": torch.ones(2, 4), "shape": (8,)},
        ValueError,
        "op: w must be float32/bfloat16/float16 [8]; got [2, 4] float32 on cpu",
    ),
    (
        {"value": WEIGHT, "shape": ()},
        ValueError,
        "op: w must be float32/bfloat16/float16 []; got [4, 3] float32 on cpu",
    ),
    (
        {"value": WEIGHT, "shape": (4, 5)},
        ValueError,
        "op: w must be float32/bfloat16/float16 [4, 5] with size 5 in dimension 1; "
        "got [4, 3] float32 on cpu",
    ),
    (
        {"value": WEIGHT, "shape": ("cols", "cols")},
        ValueError,
        "op: w must be float32/bfloat16/float16 [cols, cols] with size 4 in dimension 1 "
        "(cols of an earlier argument); got [4, 3] float32 on cpu",
    ),
    (
        {"value": WEIGHT, "dims": {"rows": 5}},
        ValueError,
        "op: w must be float32/bfloat16/float16 [rows, cols] with size 5 in dimension 0 "
        "(rows of an earlier argument); got [4, 3] float32 on cpu",
    ),
    (
        {"value": WEIGHT, "like": torch.ones(1, device="meta")},
        ValueError,
        "op: w must be on meta; got [4, 3] float32 on cpu. Hint: w.to('meta')",
    ),
    (
        {"value": WEIGHT.T},
        ValueError,
        "op: w must be contiguous; got strides (1, 3) for shape [3, 4]. "
        "Hint: w.contiguous() makes a copy",
    ),
    (
        {"value": WEIGHT.clone().requires_grad_()},
        ValueError,
        "op: w must be without requires_grad; got [4, 3] float32 on cpu. Hint: w.detach()",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), TENSORS, ids=[t[2][:70] for t in TENSORS])
def test_bad_tensors(changes, error, message) -> None:
    arguments = {"shape": ("rows", "cols"), "dtypes": FLOATS, **changes}
    with pytest.raises(error) as caught:
        check_tensor("op", "w", **arguments)
    assert str(caught.value) == message


def test_a_transposed_copy_is_never_made() -> None:
    """The check refuses; it does not hand back something contiguous."""
    assert check_tensor("op", "w", WEIGHT, ("rows", "cols"), FLOATS) is None


def test_choice() -> None:
    check_choice("op", "scope", "row", ("tensor", "row"))
    for value in ("rows", None, 3):
        with pytest.raises(ValueError, match="scope") as caught:
            check_choice("op", "scope", value, ("tensor", "row"))
        assert str(caught.value) == f"op: scope must be one of tensor, row; got {value!r}"


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_number_in_range(value) -> None:
    check_range("op", "density", value, 0, 1)


@pytest.mark.parametrize(
    ("value", "whole", "error", "message"),
    [
        (1.5, False, ValueError, "op: k must be a number in [0, 1]; got 1.5"),
        (-1, True, ValueError, "op: k must be an integer in [0, 1]; got -1"),
        (float("nan"), False, ValueError, "op: k must be a number in [0, 1]; got nan"),
        ("1", False, TypeError, "op: k must be a number in [0, 1]; got str '1'"),
        (True, False, TypeError, "op: k must be a number in [0, 1]; got bool True"),
        (True, True, TypeError, "op: k must be an integer in [0, 1]; got bool True"),
        (1.0, True, TypeError, "op: k must be an integer in [0, 1]; got float 1.0"),
        (None, False, TypeError, "op: k must be a number in [0, 1]; got NoneType None"),
    ],
)
def test_number_out_of_range(value, whole: bool, error, message: str) -> None:
    with pytest.raises(error) as caught:
        check_range("op", "k", value, 0, 1, whole=whole)
    assert str(caught.value) == message
