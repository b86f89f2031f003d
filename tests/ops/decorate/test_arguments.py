"""What the ``decorate`` op refuses, and what it says."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tailor_fast.ops.decorate import (
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    decorate_official_,
)

ROWS, COLS = 3, 4
FLOATS = "float32/bfloat16/float16 [rows, cols]"


def delta() -> torch.Tensor:
    return torch.linspace(-1, 1, ROWS * COLS).reshape(ROWS, COLS)


def call(function: Callable[..., Any], **changes: Any) -> Any:
    """Call with valid arguments, some of them changed."""
    arguments: dict[str, Any] = {"gram": torch.eye(COLS)}
    if function in (decorate_exact, decorate_obs):
        arguments["delta"] = delta()
    elif function is decorate_official:
        arguments |= {"base": torch.zeros(ROWS, COLS), "tuned": delta()}
    else:
        arguments |= {"base": torch.zeros(ROWS, COLS), "weight": delta()}
    if function in (decorate_official, decorate_official_):
        arguments["sparsity"] = 0.5
    else:
        arguments["mask"] = torch.ones(ROWS, COLS, dtype=torch.bool)
    return function(**arguments | changes)


SOLVERS = [decorate_exact, decorate_exact_]
MASKED = [*SOLVERS, decorate_obs, decorate_obs_]
OFFICIAL = [decorate_official, decorate_official_]
EVERY = MASKED + OFFICIAL
IN_PLACE = [decorate_exact_, decorate_obs_, decorate_official_]


def weight_name(function: Callable[..., Any]) -> str:
    if function in IN_PLACE:
        return "weight"
    return "tuned" if function is decorate_official else "delta"


def refused(
    function: Callable[..., Any], error: type[Exception], message: str, **changes: Any
) -> None:
    with pytest.raises(error) as caught:
        call(function, **changes)
    assert str(caught.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize("function", EVERY)
def test_valid_arguments_are_accepted(function) -> None:
    call(function)


@pytest.mark.parametrize("function", EVERY)
def test_weights(function) -> None:
    name = weight_name(function)
    kind = "float32 [rows, cols]" if name == "delta" else FLOATS
    one = torch.ones(ROWS, COLS)
    refused(function, TypeError, f"{name} must be {kind}; got list", **{name: [1.0]})
    refused(
        function,
        TypeError,
        f"{name} must be {kind}; got [3, 4] float64 on cpu. Hint: {name}.to(torch.float32)",
        **{name: one.double()},
    )
    flat = f"{name} must be {kind}; got [12] float32 on cpu"
    refused(function, ValueError, flat, **{name: one.flatten()})
    strides = (
        f"{name} must be contiguous; got strides (1, 3) for shape [3, 4]. "
        f"Hint: {name}.contiguous() makes a copy"
    )
    refused(function, ValueError, strides, **{name: torch.ones(COLS, ROWS).T})
    grad = f"{name} must be without requires_grad; got [3, 4] float32 on cpu. Hint: {name}.detach()"
    refused(function, ValueError, grad, **{name: torch.ones(ROWS, COLS, requires_grad=True)})
    for value in (math.nan, math.inf, -math.inf):
        bad = one.clone()
        bad[1, 2] = value
        refused(
            function, ValueError, f"{name} must be finite; got {value} at [1, 2]", **{name: bad}
        )


@pytest.mark.parametrize("function", [*IN_PLACE, decorate_official])
def test_base(function) -> None:
    name = weight_name(function)
    half = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)
    first, second = (name, "base") if function in IN_PLACE else ("base", name)
    kinds = ("float32", "bfloat16") if function in IN_PLACE else ("bfloat16", "float32")
    mixed = f"{second} must be {kinds[0]} like {first}; got {kinds[1]}"
    refused(function, TypeError, mixed, base=half)
    bad = torch.zeros(ROWS, COLS)
    bad[2, 0] = math.nan
    refused(function, ValueError, "base must be finite; got nan at [2, 0]", base=bad)
    narrow = (
        f"{second} must be {FLOATS} with size {COLS if first == name else 5} in dimension 1 "
        f"(cols of an earlier argument); got [3, {5 if first == name else COLS}] float32 on cpu"
    )
    refused(function, ValueError, narrow, base=torch.zeros(ROWS, 5))


@pytest.mark.parametrize("function", IN_PLACE)
def test_overlapping_weights(function) -> None:
    memory = torch.zeros(ROWS + 1, COLS)
    overlap = "weight must be in memory apart from base; got overlapping [3, 4] float32 on cpu"
    refused(function, ValueError, overlap, weight=memory[1:], base=memory[:-1])
    refused(function, ValueError, overlap, weight=memory[:-1], base=memory[1:])
    both = torch.zeros(2, ROWS, COLS)
    call(function, weight=both[0], base=both[1])


@pytest.mark.parametrize("function", MASKED)
def test_mask(function) -> None:
    kind = "mask must be bool [rows, cols]"
    refused(function, TypeError, f"{kind}; got NoneType", mask=None)
    refused(
        function,
        TypeError,
        f"{kind}; got [3, 4] float32 on cpu. Hint: mask.to(torch.bool)",
        mask=torch.ones(ROWS, COLS),
    )
    tall = (
        f"{kind} with size 3 in dimension 0 (rows of an earlier argument); got [4, 4] bool on cpu"
    )
    refused(function, ValueError, tall, mask=torch.ones(4, COLS, dtype=torch.bool))
    elsewhere = "mask must be on cpu; got [3, 4] bool on meta. Hint: mask.to('cpu')"
    mask = torch.ones(ROWS, COLS, dtype=torch.bool, device="meta")
    refused(function, ValueError, elsewhere, mask=mask)


@pytest.mark.parametrize("function", EVERY)
def test_gram(function) -> None:
    kind = "gram must be float32 [cols, cols]"
    double = f"{kind}; got [4, 4] float64 on cpu. Hint: gram.to(torch.float32)"
    refused(function, TypeError, double, gram=torch.eye(COLS).double())
    wide = f"{kind} with size 4 in dimension 1 (cols of an earlier argument)"
    refused(function, ValueError, f"{wide}; got [4, 5] float32 on cpu", gram=torch.ones(4, 5))
    infinite = torch.eye(COLS)
    infinite[3, 1] = infinite[1, 3] = -math.inf
    refused(function, ValueError, "gram must be finite; got -inf at [1, 3]", gram=infinite)
    triangle = torch.ones(COLS, COLS).tril()
    unequal = "gram must be symmetric; got |gram - gram.T| up to 1 beside a diagonal up to 1"
    refused(function, ValueError, unequal, gram=triangle)
    negative = torch.diag(torch.tensor([1.0, 2.0, -0.5, 1.0]))
    below = "gram must be without negative diagonal entries; got -0.5"
    refused(function, ValueError, below, gram=negative)


def test_symmetry_is_checked_in_every_block() -> None:
    cols = 2100  # three blocks
    mask = torch.ones(1, cols, dtype=torch.bool)
    for at in [(0, 2099), (1030, 3), (1500, 1100), (2099, 2098)]:
        gram = torch.eye(cols)
        gram[at] = 1e-3
        with pytest.raises(ValueError, match="decorate_exact: gram must be symmetric"):
            decorate_exact(torch.ones(1, cols), mask, gram)
    gram[at] = 1e-5  # the rounding of a TF32 GEMM
    decorate_exact(torch.ones(1, cols), mask, gram)


@pytest.mark.parametrize("function", EVERY)
def test_percdamp(function) -> None:
    bounds = "percdamp must be a number in [0.0, 1e+30]"
    refused(function, ValueError, f"{bounds}; got -0.01", percdamp=-0.01)
    refused(function, ValueError, f"{bounds}; got nan", percdamp=math.nan)
    refused(function, ValueError, f"{bounds}; got inf", percdamp=math.inf)
    refused(function, TypeError, f"{bounds}; got str '1%'", percdamp="1%")


@pytest.mark.parametrize("function", SOLVERS)
def test_solver(function) -> None:
    damping = "damping must be a number in [0.0, 1e+30]; got"
    refused(function, ValueError, f"{damping} -1.0", damping=-1.0)
    refused(function, ValueError, f"{damping} nan", damping=math.nan)
    tol = "tol must be a number in [1e-12, 1.0]; got"
    for value in (0.0, 2.0, math.nan):
        refused(function, ValueError, f"{tol} {value}", tol=value)
    limit = "max_iterations must be an integer in [1, 1000000]; got"
    refused(function, ValueError, f"{limit} 0", max_iterations=0)
    refused(function, ValueError, f"{limit} 1000001", max_iterations=1000001)
    refused(function, TypeError, f"{limit} float 10.0", max_iterations=10.0)


@pytest.mark.parametrize("function", SOLVERS)
def test_right_side(function) -> None:
    rhs = torch.ones(ROWS, COLS)
    double = (
        "rhs must be float32 [rows, cols]; got [3, 4] float64 on cpu. Hint: rhs.to(torch.float32)"
    )
    refused(function, TypeError, double, rhs=rhs.double())
    bad = rhs.clone()
    bad[0, 3] = math.nan
    refused(function, ValueError, "rhs must be finite; got nan at [0, 3]", rhs=bad)
    alone = "target_energy must be None without rhs; got 1.0"
    refused(function, ValueError, alone, target_energy=1.0)
    energy = "target_energy must be a number in [0.0, 1e+30]; got"
    refused(function, ValueError, f"{energy} -1.0", rhs=rhs, target_energy=-1.0)
    refused(function, TypeError, f"{energy} str 'x'", rhs=rhs, target_energy="x")
    single = (
        "target_energy must be float64 []; got [] float32 on cpu. "
        "Hint: target_energy.to(torch.float64)"
    )
    refused(function, TypeError, single, rhs=rhs, target_energy=torch.ones(()))
    many = "target_energy must be float64 []; got [2] float64 on cpu"
    pair = torch.ones(2, dtype=torch.float64)
    refused(function, ValueError, many, rhs=rhs, target_energy=pair)


@pytest.mark.parametrize("function", OFFICIAL)
def test_official_options(function) -> None:
    range_ = "sparsity must be a number in [0.0, 1.0]; got"
    for value in (1.5, -0.1, math.nan):
        refused(function, ValueError, f"{range_} {value}", sparsity=value)
    refused(function, TypeError, f"{range_} str '90%'", sparsity="90%")
    refused(function, ValueError, "sparsity must be less than 1; got 1.0", sparsity=1.0)
    two = "score_weights must be two numbers; got"
    refused(function, TypeError, f"{two} 0.5", score_weights=0.5)
    refused(function, TypeError, f"{two} (1.0,)", score_weights=(1.0,))
    share = "score_weights must be a number in [0.0, 1.0]; got"
    refused(function, ValueError, f"{share} 1.5", score_weights=(0.5, 1.5))
    refused(function, ValueError, f"{share} nan", score_weights=(math.nan, 0.5))
    block = "block_size must be an integer in [1, 2147483647]; got"
    refused(function, ValueError, f"{block} 0", block_size=0)
    refused(function, TypeError, f"{block} bool True", block_size=True)
    flag = "reproduce_nan must be a bool; got 1"
    refused(function, TypeError, flag, reproduce_nan=1)


@pytest.mark.parametrize("function", OFFICIAL)
def test_official_masks(function) -> None:
    groups = "prunen must be an integer in [0, 4]; got"
    refused(function, ValueError, f"{groups} 5", prunen=5, prunem=4)
    refused(function, ValueError, f"{groups} -1", prunen=-1, prunem=4)
    above = "prunem must be an integer in [0, 2147483647]; got -4"
    refused(function, ValueError, above, prunen=2, prunem=-4)
    narrow = (
        "prunen must be at most 1, the columns of the last group of a block of 4; got 2. "
        "Hint: a block_size and a number of columns that prunem divides"
    )
    refused(function, ValueError, narrow, prunen=2, prunem=3)
    call(function, prunen=1, prunem=3)
    tops = torch.ones(ROWS, COLS, dtype=torch.bool)
    both = "tops_mask must be None with prunen; got a mask. Hint: prunen makes its own"
    refused(function, ValueError, both, prunen=2, prunem=4, tops_mask=tops)
    kind = (
        "tops_mask must be bool [rows, cols]; got [3, 4] int32 on cpu. "
        "Hint: tops_mask.to(torch.bool)"
    )
    refused(function, TypeError, kind, tops_mask=tops.int())
