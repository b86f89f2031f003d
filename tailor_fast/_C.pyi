# ruff: noqa: N999  (the usual name of a package's C extension)
"""The C++ extension: addresses from ``tensor.data_ptr()`` and sizes, nothing checked.

``width`` is bytes per element; ``allow`` may be 0 for none.
"""

openmp: bool

def codec_mark(
    base: int,
    tuned: int,
    allow: int,
    size: int,
    width: int,
    mask: int,
    counts: int,
    threads: int,
) -> int: ...
def codec_gather(
    base: int,
    tuned: int,
    size: int,
    width: int,
    mask: int,
    counts: int,
    words: int,
    threads: int,
) -> None: ...
def codec_apply(
    target: int,
    size: int,
    width: int,
    mask: int,
    counts: int,
    words: int,
    word_count: int,
    threads: int,
) -> tuple[str, int, int, int] | None: ...
def instruction_sets() -> list[str]: ...
def made_by_intel() -> bool: ...
def use_instruction_set(name: str) -> None: ...
def decorate_exact(
    delta: int,
    mask: int,
    rhs: int,
    gram: int,
    rows: int,
    cols: int,
    damping: float,
    tol: float,
    max_iterations: int,
    patch: int,
    stats: int,
    threads: int,
) -> None: ...
def decorate_objectives(
    errors: int,
    delta: int,
    patch: int,
    mask: int,
    upper: int,
    rows: int,
    cols: int,
    threads: int,
) -> list[float]: ...
def decorate_sweep(
    weight: int,
    weight_stride: int,
    mask: int,
    mask_stride: int,
    target: int,
    target_stride: int,
    factor: int,
    diagonal: int,
    errors: int,
    errors_stride: int,
    rows: int,
    width: int,
    first: int,
    last: int,
    threads: int,
) -> None: ...
def decorate_sweep_delta(
    weight: int,
    delta: int,
    mask: int,
    factor: int,
    diagonal: int,
    errors: int,
    patch: int,
    rest: int,
    rows: int,
    width: int,
    cols: int,
    threads: int,
) -> None: ...
def decorate_score(
    weight: int,
    weight_stride: int,
    salience: int,
    squares: int,
    score: int,
    rows: int,
    width: int,
    salience_weight: float,
    sensitivity_weight: float,
    guarded: bool,
    threads: int,
) -> None: ...

GRAM_DIAGONAL_TOKENS: int

def gemm(
    a: int,
    a_row: int,
    a_col: int,
    b: int,
    b_row: int,
    b_col: int,
    c: int,
    c_row: int,
    rows: int,
    cols: int,
    depth: int,
    scale: float,
    accumulate: bool,
    lower: bool,
    threads: int,
) -> None: ...
def gram_convert(
    x: int,
    kind: int,
    cols: int,
    index: int,
    first: int,
    count: int,
    out: int,
    threads: int,
) -> None: ...
def gram_add_diagonal(
    diag: int,
    x: int,
    kind: int,
    cols: int,
    index: int,
    count: int,
    sums: int,
    threads: int,
) -> None: ...

# Addresses of base, tuned, column_weight (0: none); rows, cols; numbers of dtype and terms;
# salience_weight; number of normalize; address of the affine (0: measured).
_Pair = tuple[int, int, int, int, int, int, int, float, int, int]
# Linear index of the first score that does not exist, and what is there instead.
_Fault = tuple[int, float] | None

def select_mask(
    pair: _Pair,
    unit_rows: int,
    unit_cols: int,
    k: int,
    last_k: int,
    mask: int,
    threads: int,
    stream_from: int,
    budget_part: int,
    bracket: tuple[float, int, float, int] | None,
) -> tuple[_Fault, int, int]: ...
def select_count(
    pair: _Pair,
    prefix: int | None,
    low: int,
    high: int,
    counts: int,
    keys: int,
    threads: int,
) -> tuple[_Fault, int, int]: ...
def select_mark(
    pair: _Pair, threshold: int, ties: int, mask: int, threads: int
) -> tuple[_Fault, int]: ...
def select_affine(pair: _Pair, affine: int, threads: int) -> _Fault: ...
def select_scores(pair: _Pair, scores: int, threads: int) -> _Fault: ...
def read_probe(arrays: list[int], words: int, threads: int) -> int: ...
