"""What depends on the values of the tensors: checks inside the registered ops."""

import math

import torch

from tailor_fast._core.checks import describe, fail

# A Gram from fp32 GEMMs is symmetric to 1e-6 of its diagonal, one from TF32 GEMMs to 1e-5. Worse is
# another matrix: a cross Gram, one triangle, a shifted slice.
SYMMETRY_TOLERANCE = 1e-4
_BLOCK = 1024


def check_finite(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` with the first index at which ``tensor [rows, cols]`` is not finite."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both propagate NaN
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    row, col = divmod(int(tensor.isfinite().logical_not_().flatten().nonzero()[0]), tensor.shape[1])
    fail(op, name, "finite", f"{tensor[row, col].item()} at [{row}, {col}]")


def check_gram(op: str, gram: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``gram [cols, cols]`` is finite and symmetric, diagonal >= 0."""
    check_finite(op, "gram", gram)
    if gram.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in torch.aminmax(gram.diagonal()))
    if lowest < 0:
        fail(op, "gram", "without negative diagonal entries", f"{lowest}")
    worst = gram.new_zeros(())
    for start in range(0, gram.shape[0], _BLOCK):
        for other in range(start, gram.shape[0], _BLOCK):
            upper = gram[start : start + _BLOCK, other : other + _BLOCK]
            lower = gram[other : other + _BLOCK, start : start + _BLOCK]
            worst = torch.maximum(worst, (upper - lower.T).abs_().amax())
    if worst.item() > SYMMETRY_TOLERANCE * highest:
        got = f"|gram - gram.T| up to {worst.item():.3g} beside a diagonal up to {highest:.3g}"
        fail(op, "gram", "symmetric", got)


def check_apart(op: str, weight: torch.Tensor, base: torch.Tensor) -> None:
    """Raise ``ValueError`` when the weight that is changed shares memory with the base."""
    ends = weight.data_ptr() + weight.nbytes, base.data_ptr() + base.nbytes
    if weight.data_ptr() < ends[1] and base.data_ptr() < ends[0]:
        fail(op, "weight", "in memory apart from base", f"overlapping {describe(weight)}")
