"""Rejected inputs with their messages, registration, fakes, misuse of ``TopKSelector``."""

import re
from typing import Any
from unittest import mock

import pytest
import torch

from tailor_fast._core.backend import BackendUnavailableError
from tailor_fast.ops.select import TopKSelector, select_patch, selector, topk_mask
from tests.ops.select.cases import make_pair

NAN, INF = float("nan"), float("inf")
BASE, TUNED, C = make_pair(4, 6)


def refuse(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match="^" + re.escape(message))


@pytest.mark.parametrize(
    ("scores", "k", "error", "message"),
    [
        (
            [1.0],
            1,
            TypeError,
            "topk_mask: scores must be a float32/bfloat16/float16 tensor; got list",
        ),
        (torch.zeros(3, dtype=torch.int64), 1, TypeError, "topk_mask: scores must be a float32/"),
        (
            torch.zeros(3, 4).T,
            1,
            ValueError,
            "topk_mask: scores must be contiguous; got strides (1",
        ),
        (torch.zeros(3, requires_grad=True), 1, ValueError, "topk_mask: scores must be without"),
        (torch.zeros(3), 4, ValueError, "topk_mask: k must be an integer in [0, 3]; got 4"),
        (torch.zeros(3), -1, ValueError, "topk_mask: k must be an integer in [0, 3]; got -1"),
        (
            torch.zeros(3),
            1.0,
            TypeError,
            "topk_mask: k must be an integer in [0, 3]; got float 1.0",
        ),
        (torch.zeros(3), True, TypeError, "topk_mask: k must be an integer in [0, 3]; got bool"),
        (
            torch.tensor([0, NAN]),
            1,
            ValueError,
            "topk_mask: scores must be free of NaN; got nan at",
        ),
    ],
)
def test_topk_mask_refuses(scores: Any, k: Any, error: type[Exception], message: str) -> None:
    with refuse(error, message):
        topk_mask(scores, k)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": None}, TypeError, "base must be float32/bfloat16/float16 [rows, cols]; got None"),
        ({"base": BASE.double()}, TypeError, "base must be float32/bfloat16/float16 [rows, cols]"),
        (
            {"base": BASE[0]},
            ValueError,
            "base must be float32/bfloat16/float16 [rows, cols]; got [6]",
        ),
        (
            {"tuned": TUNED.half()},
            TypeError,
            "tuned must be float32 [rows, cols]; got [4, 6] float16",
        ),
        ({"tuned": TUNED[:3]}, ValueError, "tuned must be float32 [rows, cols] with size 4 in"),
        ({"tuned": TUNED.T.contiguous().T}, ValueError, "tuned must be contiguous; got strides"),
        ({"column_weight": C[:5].clone()}, ValueError, "column_weight must be float32 [cols] with"),
        ({"column_weight": C.double()}, TypeError, "column_weight must be float32 [cols]; got [6]"),
        (
            {"column_weight": None},
            TypeError,
            "column_weight must be float32 [cols]; got None. Hint",
        ),
        ({"sensitivity": "owl"}, ValueError, "sensitivity must be one of obs, diag, ratio, weight"),
        ({"density": 1.5}, ValueError, "density must be a number in [0, 1]; got 1.5"),
        ({"density": NAN}, ValueError, "density must be a number in [0, 1]; got nan"),
        ({"density": "0.1"}, TypeError, "density must be a number in [0, 1]; got str '0.1'"),
        ({"salience_weight": -0.1}, ValueError, "salience_weight must be a number in [0, 1]"),
        (
            {"normalize": "column"},
            ValueError,
            "normalize must be one of row_block, row, tensor, none",
        ),
        ({"scope": "model"}, ValueError, "scope must be one of tensor, block, row; got 'model'"),
        (
            {"scope": "layer"},
            ValueError,
            "scope must be one of tensor, block, row; got 'layer'. Hint",
        ),
        (
            {"scope": "global"},
            ValueError,
            "scope must be one of tensor, block, row; got 'global'. H",
        ),
        ({"backend": "abacus"}, ValueError, "select: backend must be one of auto, reference"),
        ({"backend": "cuda"}, BackendUnavailableError, "select: backend 'cuda' is not implemented"),
    ],
)
def test_select_patch_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"base": BASE, "tuned": TUNED, "column_weight": C, **change}
    op = "" if "backend" in change else "select_patch: "
    with refuse(error, op + message):
        select_patch(given.pop("base"), given.pop("tuned"), given.pop("column_weight"), **given)


def test_wide_scopes_name_the_selector() -> None:
    with pytest.raises(ValueError, match="TopKSelector finds one k over several tensors"):
        select_patch(BASE, TUNED, C, scope="layer")


POISON = [("base", NAN, "nan"), ("tuned", NAN, "nan"), ("base", INF, "inf"), ("tuned", -INF, "inf")]


@pytest.mark.parametrize(("where", "value", "got"), POISON)
@pytest.mark.parametrize(
    "options", [{}, {"salience_weight": 1}, {"salience_weight": 0}, {"density": 0}]
)
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("normalize", ["row_block", "tensor", "none"])
def test_poison_is_named_by_tensor_and_first_index(
    where: str, value: float, got: str, options: Any, scope: Any, normalize: Any
) -> None:
    pair = {"base": BASE.clone(), "tuned": TUNED.clone()}
    pair[where][1, 4] = pair[where][2, 1] = value
    options = {"sensitivity": "weight", "scope": scope, "normalize": normalize, **options}
    message = f"select_patch: scores of 'q_proj' must be finite; got {got} at linear index 10. Hint"
    with refuse(ValueError, message):
        select_patch(pair["base"], pair["tuned"], C, name="q_proj", **options)


def test_the_same_infinity_on_both_sides_is_refused() -> None:
    base, tuned = BASE.clone(), TUNED.clone()
    base[3, 5] = tuned[3, 5] = INF
    with refuse(ValueError, "select_patch: scores must be finite; got nan at linear index 23"):
        select_patch(base, tuned, C)


@pytest.mark.parametrize("normalize", ["row_block", "row", "tensor", "none"])
def test_overflow_is_refused(normalize: Any) -> None:
    base, tuned = BASE.clone(), TUNED.clone()
    base[0, 2], tuned[0, 2] = -3e38, 3e38
    with refuse(ValueError, "select_patch: scores must be finite; got inf at linear index 2"):
        select_patch(base, tuned, C, normalize=normalize)
    tuned[0, 2], base[0, 2] = 1e30, 0  # the delta is finite, its square is not
    with refuse(ValueError, "select_patch: scores must be finite; got inf at linear index 2"):
        select_patch(base, tuned, C, normalize=normalize)
    assert int(select_patch(base, tuned, normalize=normalize, salience_weight=1).sum()) == 2


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_column_weight_values_are_refused(value: float) -> None:
    weight = C.clone()
    weight[3] = value
    message = f"column_weight of 'w' must be finite and >= 0; got {value} at column 3"
    with refuse(ValueError, f"select_patch: {message}"):
        select_patch(BASE, TUNED, weight, name="w")
    with refuse(ValueError, f"TopKSelector.observe: {message}"):
        TopKSelector(0.1).observe("w", BASE, TUNED, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.tailor_fast
    scores = torch.randn(3, 5).to(dtype)
    torch.library.opcheck(ops.topk_mask.default, (scores, 4, "auto"))
    base, tuned, c = make_pair(4, 130, dtype)
    for weight, name in ((c, "w"), (None, None)):
        options = ("obs", 0.1, 1.0 if weight is None else 0.5, "row_block", "block", name, "auto")
        torch.library.opcheck(ops.select_patch.default, (base, tuned, weight, *options))


def test_meta_tensors_give_shapes() -> None:
    base, tuned, c = (x.to("meta") for x in make_pair(4, 130))
    for mask in (select_patch(base, tuned, c, name="w"), topk_mask(base, 7)):
        assert (mask.shape, mask.dtype, mask.device.type) == ((4, 130), torch.bool, "meta")


def test_explicit_backend_is_the_same() -> None:
    mask = select_patch(BASE, TUNED, C, density=0.5)
    assert torch.equal(mask, select_patch(BASE, TUNED, C, density=0.5, backend="reference"))
    assert torch.equal(topk_mask(BASE, 5), topk_mask(BASE, 5, backend="reference"))


@pytest.mark.parametrize(
    ("density", "options", "error", "message"),
    [
        (2, {}, ValueError, "TopKSelector: density must be a number in [0, 1]; got 2"),
        (0.1, {"memory": -1}, ValueError, "TopKSelector: memory must be an integer in [0, inf]"),
        (0.1, {"memory": 1.5}, TypeError, "TopKSelector: memory must be an integer in [0, inf]"),
        (0.1, {"sensitivity": 3}, ValueError, "TopKSelector: sensitivity must be one of obs, diag"),
        (0.1, {"normalize": "all"}, ValueError, "TopKSelector: normalize must be one of row_block"),
        (0.1, {"salience_weight": 7}, ValueError, "TopKSelector: salience_weight must be a number"),
    ],
)
def test_selector_refuses_options(
    density: float, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with refuse(error, message):
        TopKSelector(density, **options)


def observed(**options: Any) -> TopKSelector:
    found = TopKSelector(0.25, **options)
    found.observe("w", BASE, TUNED, C)
    return found


def finished() -> TopKSelector:
    found = observed()
    assert found.finish()
    assert found.finish()
    return found


def test_selector_refuses_calls_out_of_order() -> None:
    with refuse(ValueError, "TopKSelector.finish: the call must be after observe(); got nothing"):
        TopKSelector(0.1).finish()
    early = "must be after finish() returned True; got a call before it"
    with refuse(ValueError, f"TopKSelector.mask: the call {early}"):
        observed().mask("w", BASE, TUNED, C)
    with refuse(ValueError, f"TopKSelector.kept: the call {early}"):
        observed().kept("w")
    with refuse(ValueError, "TopKSelector.observe: the call must be before finish() returned True"):
        finished().observe("v", BASE, TUNED, C)


def test_selector_refuses_names() -> None:
    with refuse(TypeError, "TopKSelector.observe: name must be a string; got int"):
        TopKSelector(0.1).observe(3, BASE, TUNED, C)
    with refuse(
        ValueError, "TopKSelector.observe: 'w' must be observed once in a round; got a sec"
    ):
        observed().observe("w", BASE, TUNED, C)
    with refuse(ValueError, "TopKSelector.mask: name must be one of the observed tensors; got 'v'"):
        finished().mask("v", BASE, TUNED, C)
    with refuse(ValueError, "TopKSelector.kept: name must be one of the observed tensors; got 'v'"):
        finished().kept("v")


ZERO = torch.zeros(4, 6)


def second_round() -> TopKSelector:
    # 4 bytes hold one key, and the first estimate is wrong: all of 'w' scores below 'x'.
    found = TopKSelector(0.25, memory=4, normalize="none", salience_weight=1)
    found.observe("w", ZERO, ZERO + 0.5)
    found.observe("x", ZERO, ZERO + 1)
    assert not found.finish()
    return found


def test_selector_refuses_another_second_round() -> None:
    absent = "TopKSelector.finish: 'w' must be observed in this round; got not at all"
    with refuse(ValueError, absent):
        second_round().finish()
    new = "TopKSelector.observe: name must be one of the tensors of the first round; got 'y'"
    with refuse(ValueError, new):
        second_round().observe("y", ZERO, ZERO)
    with refuse(ValueError, "TopKSelector.observe: 'w' must be [4, 6] as before; got [3, 6]"):
        second_round().observe("w", ZERO[:3], ZERO[:3])


@pytest.mark.parametrize(
    ("w", "x", "rounds", "got"),
    [
        (0.5, 2.0, 1, "0 counted instead of 24"),
        (1.0, 1.0, 1, "48 counted instead of 24"),
        (4.0, 1.0, 2, "rank -12 of 24"),  # the bin counts as many, too many lie above it
    ],
)
def test_selector_notices_another_content_in_a_later_round(
    w: float, x: float, rounds: int, got: str
) -> None:
    found = second_round()
    for left in reversed(range(rounds)):
        found.observe("w", ZERO, ZERO + w)
        found.observe("x", ZERO, ZERO + x)
        if left:
            assert not found.finish()
    message = f"TopKSelector.finish: the tensors must be the same in every round; got {got}"
    with refuse(ValueError, message):
        found.finish()


def test_selector_notices_another_content_when_marking() -> None:
    with refuse(
        ValueError, "TopKSelector.mask: 'w' must be what was observed; got 0 elements above"
    ):
        finished().mask("w", BASE, BASE, C)
    with refuse(ValueError, "TopKSelector.mask: 'w' must be [4, 6] as before; got [4, 5]"):
        finished().mask("w", BASE[:, :5].contiguous(), TUNED[:, :5].contiguous(), C[:5])


def test_selector_refuses_rows_out_of_order() -> None:
    found = TopKSelector(0.25)
    with refuse(ValueError, "TopKSelector.observe: rows must be an integer in [4, inf]; got 3"):
        found.observe("w", BASE, TUNED, C, rows=3)
    with refuse(ValueError, "TopKSelector.observe: first_row must be an integer in [0, 1]; got 2"):
        found.observe("w", BASE[:3], TUNED[:3], C, first_row=2, rows=4)
    with refuse(
        ValueError, "TopKSelector.observe: first_row must be 0, the next row of 'w'; got 1"
    ):
        found.observe("w", BASE[:3], TUNED[:3], C, first_row=1, rows=4)
    found.observe("w", BASE[:3], TUNED[:3], C, rows=4)
    with refuse(ValueError, "TopKSelector.finish: 'w' must be observed in this round; got 3 of 4"):
        found.finish()
    with refuse(
        ValueError, "TopKSelector.observe: first_row must be 3, the next row of 'w'; got 0"
    ):
        found.observe("w", BASE[:3], TUNED[:3], C, rows=4)
    with refuse(ValueError, "TopKSelector.mask: first_row must be 0, the next row of 'w'; got 1"):
        finished().mask("w", BASE[1:], TUNED[1:], C, first_row=1, rows=4)
    with refuse(
        ValueError, "TopKSelector.observe: 'w' must be whole for normalize='tensor'; got 3"
    ):
        TopKSelector(0.1, normalize="tensor").observe("w", BASE[:3], TUNED[:3], C, rows=4)


def test_selector_is_spent_after_poison() -> None:
    found = observed()
    tuned = TUNED.clone()
    tuned[3, 0] = NAN
    found.observe("v", BASE[:2], TUNED[:2], C, rows=4)
    message = "TopKSelector.observe: scores of 'v' must be finite; got nan at linear index 18"
    with mock.patch.object(selector, "SLICE", 6), refuse(ValueError, message):
        found.observe("v", BASE[2:], tuned[2:], C, first_row=2, rows=4)
    with refuse(ValueError, "TopKSelector.finish: the selector must be whole; got one whose obs"):
        found.finish()
    with refuse(ValueError, "TopKSelector.observe: the selector must be whole; got one whose obs"):
        found.observe("x", BASE, TUNED, C)
