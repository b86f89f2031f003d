"""``codec`` against the usual sparse form in torch: int64 positions and values, put by index."""

from typing import Any, cast

import pytest
import torch

from benchmarks.timing import DEVICE, measure
from tailor_fast._core.backend import Backend
from tailor_fast.ops import backends
from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch

SIZE = 8 * 1024 * 1024
DENSITIES = [0.01, 0.1, 0.5]
BACKENDS = [name for name, reason in backends()["codec"][DEVICE].items() if reason is None]
PROVIDERS = [*BACKENDS, "coo"]


def pair(density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 weights, and the same with a share of them moved by half."""
    torch.manual_seed(0)
    base = torch.randn(SIZE, device=DEVICE).bfloat16()
    moved = torch.rand(SIZE, device=DEVICE) < density
    return base, torch.where(moved, base * 1.5, base)


def coo(base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that differ, and the values there."""
    index = (base.view(torch.int16) != tuned.view(torch.int16)).nonzero().view(-1)
    return index, tuned[index]


def checked_patch(base: torch.Tensor, tuned: torch.Tensor, backend: Backend) -> EncodedPatch:
    """The gate: exact there and back."""
    patch = encode_patch(base, tuned, backend=backend)
    target = base.clone()
    for wanted in (tuned, base):
        apply_patch_(target, patch, backend=backend)
        if not torch.equal(target.view(torch.int16), wanted.view(torch.int16)):
            raise AssertionError(f"{backend}: not exact")
    return patch


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("density", DENSITIES)
def test_encode(benchmark: Any, provider: str, density: float) -> None:
    """Read the pair, give the patch; bytes of the pair per second."""
    base, tuned = pair(density)
    group = f"encode {SIZE} bfloat16, density {density}"
    work = 2 * base.nbytes
    if provider == "coo":
        measure(benchmark, group, lambda: coo(base, tuned), work)
        return
    backend = cast(Backend, provider)
    checked_patch(base, tuned, backend)
    measure(benchmark, group, lambda: encode_patch(base, tuned, backend=backend), work)


@pytest.mark.parametrize("provider", [*PROVIDERS, "copy"])
@pytest.mark.parametrize("density", DENSITIES)
def test_apply(benchmark: Any, provider: str, density: float) -> None:
    """Change the target in place; bytes of the target per second. ``copy`` is the roofline."""
    base, tuned = pair(density)
    group = f"apply {SIZE} bfloat16, density {density}"
    if provider == "copy":
        measure(benchmark, group, lambda: base.copy_(tuned), base.nbytes)
        return
    if provider == "coo":
        index, values = coo(base, tuned)
        measure(benchmark, group, lambda: base.index_copy_(0, index, values), base.nbytes)
        return
    backend = cast(Backend, provider)
    patch = checked_patch(base, tuned, backend)
    measure(benchmark, group, lambda: apply_patch_(base, patch, backend=backend), base.nbytes)
