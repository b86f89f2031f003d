"""The ``select`` op in plain torch: the oracle, a backend on any device, and the arithmetic itself.

Every backend gives the same bits as this one, whatever the device, the threads and the chunks. So
the arithmetic is fixed here to the last operation. Each operation is one IEEE 754 operation rounded
to nearest even, in the dtype named; subnormals are kept; nothing is contracted into an FMA, except
that S2 may be; a division is never a multiplication by a reciprocal (torch turns ``x / number``
and ``number / x`` into one, so divisors and dividends below are tensors).

Terms, in float32. ``b``, ``t`` are base and tuned converted to float32 (exact), ``c`` the column
weight, ``w`` the salience weight (float64)::

    d = t - b        s = |d|
    v = (d * d) * c  for obs     v = s * c  for diag and ratio     v = (t * t) * c  for weight

``s`` alone is used for w = 1 (``c`` is then not read), ``v`` alone for w = 0. ``s``, the ``v`` that
is used and the score must be finite; otherwise ValueError with the first linear index.

Moments of a term ``x`` over its unit of normalisation with ``n`` elements: one pass, about a pivot
``p``, the unit's first element. ``e`` is float32, the rest float64::

    e = x - p        S1 = fold(e)        S2 = fold(e * e)
    q = S1 / n       mean = p + q        std = sqrt((S2 - S1 * q) / (n - 1))
    m = float32(mean)
    a = float32(w / std) if std >= 2**-126 else 0            (w of the term: w for s, 1 - w for v)

Squares of float32 numbers are exact in float64, so an FMA changes nothing in S2. Nearly equal
elements have exact differences; equal ones give S1 = S2 = 0. And because the pivot is one of the
elements, ``|p - mean| < sqrt(n) std``: even an outlier as pivot costs at most sqrt(n) 2**-23 std
in an ``e`` and a factor n of 2**-53 by cancellation. ``a`` = 0 is "zero or undefined std gives
z = 0"; the bound, the smallest normal float32, keeps ``a`` finite. Without normalisation m = 0 and
a = float32(w). Normalising that cannot change the order within a unit of scope never gets here
(``options.ranking_normalize``).

``fold`` adds along the columns of each 128-column block of each row, then along the blocks of each
row, then along the rows of the tensor, as far as the unit reaches (row_block, row, tensor). Each
time: append +0 up to the next power of two, then add the upper half to the lower half until one
element is left. Vector lanes, the threads of a warp and blocks of rows all map onto halves.

Score, float32, in this order: ``(s - m_s) * a_s + (v - m_v) * a_v``. Scores are compared by
``radix.float_keys``, so -0 equals +0, and selected by exact histograms of the keys.
"""

from tailor_fast.ops.select.reference.masks import (
    count_keys_,
    mark_pair_,
    select_patch,
    select_patches,
    topk_mask,
)
from tailor_fast.ops.select.reference.scores import score_pair, tensor_affine

__all__ = [
    "count_keys_",
    "mark_pair_",
    "score_pair",
    "select_patch",
    "select_patches",
    "tensor_affine",
    "topk_mask",
]
