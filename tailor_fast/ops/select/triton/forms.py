"""The forms in which real launches compile the kernels, for ahead-of-time compilation."""

from collections.abc import Iterator, Mapping
from typing import Any

import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch
from tailor_fast.ops.select.triton import bracket, lists, moments, rows, whole
from tailor_fast.ops.select.triton.masks import SAMPLE_LANES
from tailor_fast.ops.select.triton.pair import BY_COLUMN, BY_ROW, FLAT, FOLD_LANES, LANES
from tailor_fast.ops.select.triton.scores import (
    NO_NORM,
    OBS,
    ROW,
    ROW_BLOCK,
    SALIENCE,
    SCORES,
    TENSOR,
    WEIGHT,
)

# Types and 16-byte alignment of every argument; pairs are bfloat16 unless a form says otherwise.
_TYPES = {
    "base_ptr": "*bf16",
    "tuned_ptr": "*bf16",
    "c_ptr": "*fp32",
    "affine_ptr": "*fp32",
    "mask_ptr": "*u8",
    "keys_ptr": "*i32",
    "out_ptr": "*fp32",
    "sums_ptr": "*fp64",
    "x_ptr": "*fp64",
    "counts_ptr": "*i32",
    "ties_ptr": "*i32",
    **dict.fromkeys(("state_ptr", "flags_ptr", "lists_ptr", "above_ptr", "first_ptr"), "*i64"),
    **dict.fromkeys(("table_ptr", "map_ptr"), "*i64"),
    "hist_ptr": "*i64",
    **dict.fromkeys(("ws", "wv", "size"), "i64"),
}
_UNALIGNED = {"map_ptr", "state_ptr", "flags_ptr", "hist_ptr", "counts_ptr"}
_UNALIGNED |= {"above_ptr", "first_ptr"}


def _form(
    name: str,
    kernel: Any,
    launch: Launch,
    constexprs: Mapping[str, object],
    **types: str,
) -> KernelForm:
    free = [argument for argument in kernel.arg_names if argument not in constexprs]
    signature = {argument: types.get(argument, _TYPES.get(argument, "i32")) for argument in free}
    pointers = {argument for argument in free if argument.endswith("_ptr")} - _UNALIGNED
    aligned = frozenset(pointers | ({"cols"} & set(free)))
    return KernelForm(name, kernel, signature, constexprs, launch, aligned)


# Name, kind, norm, salience used, sensitivity used, order, lanes.
_SCORINGS = (
    ("scores", SCORES, NO_NORM, True, False, FLAT, LANES),
    ("salience", SALIENCE, NO_NORM, True, False, FLAT, LANES),
    ("obs_row_block", OBS, ROW_BLOCK, True, True, BY_ROW, FOLD_LANES),
    ("obs_row", OBS, ROW, True, True, BY_ROW, LANES),
    ("weight_tensor", WEIGHT, TENSOR, False, True, BY_COLUMN, LANES),
    ("weight_row_block_columns", WEIGHT, ROW_BLOCK, True, True, BY_COLUMN, FOLD_LANES),
)


def _terms(scoring: tuple[Any, ...]) -> dict[str, object]:
    _, kind, norm, salience, sensitivity, order, _ = scoring
    terms = {"KIND": kind.value, "NORM": norm.value, "S": salience, "V": sensitivity}
    absent: dict[str, object] = {"base_ptr": None} if kind is SCORES else {}
    if kind in (SCORES, SALIENCE):
        absent["c_ptr"] = None
    if norm not in (TENSOR, ROW):
        absent["affine_ptr"] = None
    return {**terms, **absent, "ORDER": order}


def _name(step: str, scoring: tuple[Any, ...], ending: str = "") -> str:
    return "_".join(part for part in (step, scoring[0], ending) if part)


def _layout(scoring: tuple[Any, ...], masked: bool) -> dict[str, object]:
    """Where tiles reach beyond the tensor, 64-bit numbers of segments too: the larger code."""
    return {**_terms(scoring), "WIDE": masked, "LANES": scoring[6], "MASKED": masked}


def _tabled(scoring: tuple[Any, ...], dtype: tl.dtype, aligned: bool) -> dict[str, object]:
    """Constants of a kernel that finds its tensors in a table."""
    kept = ("KIND", "NORM", "S", "V", "ORDER")
    terms = {name: value for name, value in _terms(scoring).items() if name in kept}
    return {**terms, "DTYPE": dtype, "ALIGNED": aligned}


def _selected(scoring: tuple[Any, ...], dtype: tl.dtype = tl.bfloat16) -> Iterator[KernelForm]:
    """The bracket and the pass."""
    lanes = scoring[6] if scoring[6] == FOLD_LANES else SAMPLE_LANES
    kernel, launch = bracket.bracket_kernel, bracket.BRACKET_LAUNCH
    constants = {**_tabled(scoring, dtype, True), "LANES": lanes}
    yield _form(_name("bracket", scoring, str(dtype)), kernel, launch, constants)
    # Where tiles reach beyond the tensor, 64-bit numbers of segments too: the larger code.
    layouts = (("", False, True), ("masked", True, True), ("odd", True, False))
    for ending, masked, aligned in layouts:
        constants = {**_tabled(scoring, dtype, aligned), "LANES": scoring[6]}
        constants |= {"WIDE": masked, "MASKED": masked}
        name = "_".join(filter(None, (_name("classify", scoring, str(dtype)), ending)))
        config = bracket.classify_launch(scoring[1].value, scoring[5], scoring[2].value, aligned)
        yield _form(name, bracket.classify_kernel, config, constants)


def _searched(scoring: tuple[Any, ...]) -> Iterator[KernelForm]:
    """The passes of the descent over all elements, the scores themselves, a fault."""
    launch, layout = whole.WHOLE_LAUNCH, _layout(scoring, True)
    for kernel in (whole.digits_kernel, whole.ties_kernel, whole.mark_ties_kernel):
        yield _form(_name(kernel.__name__.removesuffix("_kernel"), scoring), kernel, launch, layout)
    for ending, keys, counted, upper in (
        ("", False, False, False),
        ("keys", True, False, False),
        ("upper", True, True, True),
        ("lower", True, True, False),
    ):
        absent = {} if counted else {"hist_ptr": None, "above_ptr": None}
        constants = {**layout, **absent, "KEYS": keys, "COUNTED": counted, "UPPER": upper}
        types = {"hist_ptr": "*i32", "out_ptr": "*i32" if keys else "*fp32"}
        name = _name("scores", scoring, ending)
        yield _form(name, whole.scores_kernel, whole.SCORES_LAUNCH, constants, **types)
    constants = {name: layout[name] for name in layout if name not in ("affine_ptr", "MASKED")}
    yield _form(_name("fault", scoring), whole.fault_kernel, launch, constants)


def _moments() -> Iterator[KernelForm]:
    """The passes for the moments of rows and tensors."""
    for norm in (ROW, TENSOR):
        terms = {"KIND": OBS.value, "NORM": norm.value, "S": True, "V": True}
        name = "row" if norm is ROW else "tensor"
        layout = {**terms, "WIDE": True, "LANES": FOLD_LANES, "MASKED": True}
        yield _form(f"sums_{name}", moments.sums_kernel, moments.SUMS_LAUNCH, layout)
        kernel, launch = moments.affine_kernel, moments.AFFINE_LAUNCH
        yield _form(f"affine_{name}", kernel, launch, terms, n="i64")
    for name, tile in (("rest", moments.FOLD_WIDE), ("all", moments.FOLD_LAST)):
        yield _form(f"fold_{name}", moments.fold_kernel, moments.FOLD_LAUNCH, tile, out_ptr="*fp64")


def _listed() -> Iterator[KernelForm]:
    """The descent over the candidates."""
    yield _form("list_digits", lists.list_digits_kernel, lists.LISTS_LAUNCH, {})
    yield _form("list_ties", lists.list_ties_kernel, lists.TIES_LAUNCH, {})
    for order, wide in ((FLAT, False), (BY_ROW, False), (BY_ROW, True), (BY_COLUMN, False)):
        constants = {"ORDER": order, "WIDE": wide}
        name = f"list_mark_{order}{'_wide' if wide else ''}"
        yield _form(name, lists.list_mark_kernel, lists.LISTS_LAUNCH, constants)


def _rows() -> Iterator[KernelForm]:
    """Scope ``row``, by the length of a row."""
    for cols in (1000, 4096, rows.LONGEST, 2 * rows.LONGEST):
        tile = rows.rows_tile(cols)
        launch = rows.rows_launch(tile, tile[1] >= cols)
        constants = {"ROWS": tile[0], "WIDTH": tile[1], "ON_CHIP": tile[1] >= cols}
        yield _form(f"rows_{cols}", rows.rows_kernel, launch, constants)


def kernels() -> tuple[KernelForm, ...]:
    """All forms."""
    forms = [*_moments(), *_listed(), *_rows()]
    for scoring in _SCORINGS:
        forms += _selected(scoring)
    for scoring in _SCORINGS[:3]:
        forms += _selected(scoring, tl.float32)
    forms += _searched(_SCORINGS[2])
    return tuple(forms)
