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
