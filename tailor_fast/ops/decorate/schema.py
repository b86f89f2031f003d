"""``torch.library`` registration of the ``decorate`` op. Imports no backend until one is called.

What must be known of the values is checked here, once for all backends: it needs the data, so it
cannot stand in ``api.py``, which also runs on meta tensors.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from tailor_fast._core.backend import Order, implementation
from tailor_fast._core.library import register
from tailor_fast.ops.damping import damping_of
from tailor_fast.ops.decorate.factors import BLOCK
from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.values import check_apart, check_finite, check_gram

# On CPU tensors Triton means its interpreter: for tests, never what `auto` takes.
ORDER: Order = {"cpu": ("native", "reference", "triton"), "cuda": ("triton", "reference")}

Tensor = torch.Tensor
Losses = tuple[Tensor, Tensor, Tensor, Tensor]
PatchAndLosses = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _load(backend: str, gram: Tensor) -> ModuleType:
    return implementation("decorate", ORDER, backend, gram.device.type)


def backend_of(gram: Tensor, backend: str) -> str:
    """The name of the backend that works on ``gram``, where ``backend`` is asked for."""
    return _load(backend, gram).__name__.rpartition(".")[2]


def _check(op: str, gram: Tensor, **tensors: Tensor | None) -> None:
    check_gram(op, gram)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_finite(op, name, tensor)


def _exact(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    percdamp: float,
    damping: float | None,
    tol: float,
    max_iterations: int,
    backend: str,
) -> PatchAndLosses:
    _check("decorate_exact", gram, delta=delta, rhs=rhs)
    if damping is None:
        damping = damping_of(gram.diagonal(), percdamp)
    run = _load(backend, gram).decorate_exact
    result: PatchAndLosses = run(
        delta, mask, gram, rhs, target_energy, damping, tol, max_iterations
    )
    return result


def _exact_(
    weight: Tensor,
    base: Tensor,
    mask: Tensor,
    gram: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    percdamp: float,
    damping: float | None,
    tol: float,
    max_iterations: int,
    backend: str,
) -> Losses:
    check_apart("decorate_exact_", weight, base)
    _check("decorate_exact_", gram, weight=weight, base=base, rhs=rhs)
    if damping is None:
        damping = damping_of(gram.diagonal(), percdamp)
    run = _load(backend, gram).decorate_exact_
    result: Losses = run(weight, base, mask, gram, rhs, target_energy, damping, tol, max_iterations)
    return result


def _factor_obs(gram: Tensor, percdamp: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _check("factor_obs", gram)
    result: tuple[Tensor, Tensor, Tensor] = _load(backend, gram).factor_obs(gram, percdamp)
    return result


def _obs(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    percdamp: float,
    factor: Sequence[Tensor] | None,
    backend: str,
) -> PatchAndLosses:
    _check("decorate_obs", gram, delta=delta)
    run = _load(backend, gram).decorate_obs
    result: PatchAndLosses = run(delta, mask, gram, percdamp, factor)
    return result


def _obs_(
    weight: Tensor,
    base: Tensor,
    mask: Tensor,
    gram: Tensor,
    percdamp: float,
    factor: Sequence[Tensor] | None,
    backend: str,
) -> Losses:
    check_apart("decorate_obs_", weight, base)
    _check("decorate_obs_", gram, weight=weight, base=base)
    run = _load(backend, gram).decorate_obs_
    result: Losses = run(weight, base, mask, gram, percdamp, factor)
    return result


def _run_official(
    weight: Tensor, base: Tensor, gram: Tensor, tops_mask: Tensor | None, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    *options, backend = rest
    run = _load(backend, gram).decorate_official_
    result: tuple[Tensor, Tensor] = run(weight, base, gram, tops_mask, OfficialOptions(*options))
    return result


def _official(
    base: Tensor, tuned: Tensor, gram: Tensor, tops_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check("decorate_official", gram, base=base, tuned=tuned)
    weight = tuned.clone()
    return weight, *_run_official(weight, base, gram, tops_mask, rest)


def _official_(
    weight: Tensor, base: Tensor, gram: Tensor, tops_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_apart("decorate_official_", weight, base)
    _check("decorate_official_", gram, weight=weight, base=base)
    return _run_official(weight, base, gram, tops_mask, rest)


def _fake_losses(like: Tensor) -> Losses:
    real = [like.new_empty((), dtype=torch.float64) for _ in range(3)]
    return real[0], real[1], real[2], like.new_empty((), dtype=torch.int64)


def _fake_factor(gram: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    blocks = gram.new_empty(-(-len(gram) // BLOCK), BLOCK, BLOCK)
    return torch.empty_like(gram), blocks, gram.new_empty((), dtype=torch.float64)


def _fake(delta: Tensor, *_: Any) -> PatchAndLosses:
    return torch.empty_like(delta), *_fake_losses(delta)


def _fake_(weight: Tensor, *_: Any) -> Losses:
    return _fake_losses(weight)


def _fake_official_(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mask = torch.empty_like(weight, dtype=torch.bool)
    return mask, weight.new_empty((), dtype=torch.float64)


def _fake_official(_base: Tensor, tuned: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(tuned), *_fake_official_(tuned)


_LOSSES = "Tensor, Tensor, Tensor, Tensor"
_EXACT = (
    "Tensor mask, Tensor gram, Tensor? rhs, Tensor? target_energy, float percdamp, float? damping,"
    " float tol, int max_iterations, str backend"
)
_OFFICIAL = (
    "Tensor gram, Tensor? tops_mask, float sparsity, float[] score_weights, int block_size,"
    " float percdamp, int prunen, int prunem, bool reproduce_nan, str backend"
)
register(f"decorate_exact(Tensor delta, {_EXACT}) -> (Tensor, {_LOSSES})", _exact, _fake)
register(
    f"decorate_exact_(Tensor(a!) weight, Tensor base, {_EXACT}) -> ({_LOSSES})", _exact_, _fake_
)
register(
    "factor_obs(Tensor gram, float percdamp, str backend) -> (Tensor, Tensor, Tensor)",
    _factor_obs,
    _fake_factor,
)
register(
    "decorate_obs(Tensor delta, Tensor mask, Tensor gram, float percdamp, Tensor[]? factor,"
    f" str backend) -> (Tensor, {_LOSSES})",
    _obs,
    _fake,
)
register(
    "decorate_obs_(Tensor(a!) weight, Tensor base, Tensor mask, Tensor gram, float percdamp,"
    f" Tensor[]? factor, str backend) -> ({_LOSSES})",
    _obs_,
    _fake_,
)
register(
    f"decorate_official(Tensor base, Tensor tuned, {_OFFICIAL}) -> (Tensor, Tensor, Tensor)",
    _official,
    _fake_official,
)
register(
    f"decorate_official_(Tensor(a!) weight, Tensor base, {_OFFICIAL}) -> (Tensor, Tensor)",
    _official_,
    _fake_official_,
)
