"""One op, one fresh random problem, held against float64 or bit for bit; raises where it is wrong.

Truth is computed apart from the package: dense float64 on the CPU. ``select`` and ``codec`` promise
bits, so there the plain torch backend on the same device and the CPU's must give the same ones.
Outputs are poisoned: what a kernel leaves unwritten, or reads though it must not, is NaN.
"""

from collections.abc import Iterator
from typing import cast, get_args

import torch

from benchmarks.gpu.plan import DENSITY, PERCDAMP
from benchmarks.gpu.run import Run
from tailor_fast._core.backend import Backend
from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch
from tailor_fast.ops.decorate import (
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    factor_obs,
)
from tailor_fast.ops.gram import accumulate_cross_gram_, accumulate_gram_, accumulate_gram_diag_
from tailor_fast.ops.select import (
    TopKSelector,
    kept_count,
    select_patch,
    select_patches,
    topk_mask,
)
from tailor_fast.ops.select.options import Normalize, Scope, Sensitivity
from tailor_fast.testing import assert_within
from tests.ops.codec.words import random_pair, raw
from tests.ops.decorate.problems import Problem, bare, damped, gram_of, objective, optimum, sweep

Shape = tuple[int, int]
SENSITIVITIES: tuple[Sensitivity, ...] = get_args(Sensitivity)
NORMALIZATIONS: tuple[Normalize, ...] = get_args(Normalize)
SCOPES: tuple[Scope, ...] = get_args(Scope)
SALIENCE = (0.5, 0.0, 1.0, 0.3, 0.8)
TOL = 1e-4  # what decorate_exact promises above the minimum


def require(holds: bool, what: str) -> None:
    """Raise ``AssertionError`` with ``what`` unless it holds."""
    if not holds:
        raise AssertionError(what)


def inputs(run: Run, tokens: int, cols: int, dtype: torch.dtype, key: int) -> torch.Tensor:
    """Layer inputs ``[tokens, cols]`` whose columns differ in size by three decades."""
    generator = run.generator(tokens, cols, key)
    scale = torch.logspace(-2, 1, cols, device=run.device)
    return (run.normal(tokens, cols, generator=generator) * scale).to(dtype)


def hold_gram(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``accumulate_gram_``: float64, exact symmetry, the same bits twice, lower triangle alone."""
    tokens, cols = shape
    x = inputs(run, tokens, cols, dtype, index)
    mask, counted = _token_mask(run, x, index)
    start = run.normal(cols, cols, generator=run.generator(cols, index))
    start = start + start.T
    poison = torch.full_like(start, float("nan")).triu(1)
    grams = [
        accumulate_gram_(start.tril() + poison, x, token_mask=mask, backend=run.backend)
        for _ in range(2)
    ]
    require(torch.equal(grams[0], grams[0].T), "not symmetric")
    require(torch.equal(*grams), "other bits in the second run")
    wide = counted.double().cpu()
    plain = (start + counted.float().T @ counted.float()).cpu()
    assert_within(grams[0].cpu(), start.double().cpu() + wide.T @ wide, plain)
    return "symmetric, same bits twice"


def hold_cross_gram(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``accumulate_cross_gram_`` of two widths."""
    tokens, cols = shape
    x = inputs(run, tokens, cols, dtype, index)
    y = inputs(run, tokens, cols // 2 + 1, dtype, index + 1)
    mask, left = _token_mask(run, x, index)
    right = y if mask is None else y[mask]
    cross = torch.zeros(cols, y.shape[1], device=run.device)
    accumulate_cross_gram_(cross, x, y, token_mask=mask, backend=run.backend)
    expected = left.double().cpu().T @ right.double().cpu()
    assert_within(cross.cpu(), expected, (left.float().T @ right.float()).cpu())
    return ""


def hold_gram_diag(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``accumulate_gram_diag_``."""
    x = inputs(run, *shape, dtype, index)
    mask, counted = _token_mask(run, x, index)
    start = run.normal(shape[1], generator=run.generator(index)).abs()
    diag = accumulate_gram_diag_(start.clone(), x, token_mask=mask, backend=run.backend)
    expected = start.double().cpu() + counted.double().cpu().square().sum(0)
    assert_within(diag.cpu(), expected, (start + counted.float().square().sum(0)).cpu())
    return ""


def _token_mask(run: Run, x: torch.Tensor, index: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Every other case leaves tokens out."""
    if index % 2 == 0:
        return None, x
    drawn = torch.rand(len(x), generator=run.generator(index), device=run.device)
    mask = drawn < 0.7
    return mask, x[mask]


def weights(
    run: Run, shape: Shape, dtype: torch.dtype, key: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base, tuned (a tenth of it untouched) and a column weight of wide spread."""
    generator = run.generator(*shape, key)
    base = run.normal(*shape, generator=generator) * 0.02
    moved = torch.rand(shape, generator=generator, device=run.device) < 0.9
    tuned = base + 0.002 * run.normal(*shape, generator=generator) * moved
    return base.to(dtype), tuned.to(dtype), run.normal(shape[1], generator=generator).exp()


def hold_select_patch(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``select_patch``, the options taken in turn."""
    base, tuned, c = weights(run, shape, dtype, index)
    sensitivity = SENSITIVITIES[index % len(SENSITIVITIES)]
    normalize = NORMALIZATIONS[(index // 2) % len(NORMALIZATIONS)]
    scope, omega = SCOPES[index % len(SCOPES)], SALIENCE[index % len(SALIENCE)]

    def mask(device: torch.device, backend: str) -> torch.Tensor:
        return select_patch(
            *(tensor.to(device) for tensor in (base, tuned, c)),
            sensitivity=sensitivity,
            density=DENSITY,
            salience_weight=omega,
            normalize=normalize,
            scope=scope,
            backend=cast(Backend, backend),
        ).cpu()

    ours = mask(run.device, run.backend)
    require(torch.equal(ours, mask(run.device, "reference")), "not the plain torch mask")
    require(torch.equal(ours, mask(torch.device("cpu"), "auto")), "not the CPU's mask")
    return f"{sensitivity}, {normalize}, {scope}, omega {omega}"


def hold_select_patches(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``select_patches`` of tensors of several sizes, each beside its own ``select_patch``."""
    rows, cols = shape
    shapes = [shape, (300, 512), (rows, cols), (1, cols), (515, 256)]
    triples = [weights(run, one, dtype, index + key) for key, one in enumerate(shapes)]
    normalize, scope = NORMALIZATIONS[index % len(NORMALIZATIONS)], SCOPES[index % len(SCOPES)]
    ours = select_patches(
        *map(list, zip(*triples, strict=True)),
        normalize=normalize,
        scope=scope,
        backend=run.backend,
    )
    for mask, triple in zip(ours, triples, strict=True):
        one = select_patch(*triple, normalize=normalize, scope=scope, backend="reference")
        require(torch.equal(mask, one), "not the plain torch mask")
    return f"{len(ours)} tensors, {normalize}, {scope}"


def hold_topk_mask(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``topk_mask`` with many ties, both zeros and infinities."""
    scores = run.normal(*shape, generator=run.generator(*shape, index))
    scores = (scores * 4).round() / 4 if index % 2 else scores
    scores.view(-1)[:: 7 + index] *= float("inf") if index % 3 == 0 else -0.0
    scores = scores.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf")).to(dtype)
    k = kept_count(scores.numel(), DENSITY)
    ours = topk_mask(scores, k, backend=run.backend)
    order = scores.cpu().double().flatten().sort(descending=True, stable=True).indices[:k]
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[order] = True
    require(torch.equal(ours.cpu().flatten(), expected), "not the first of a stable sort")
    return f"k {k}"


def hold_selector(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``TopKSelector`` over three tensors, in memory that makes it look twice."""
    tensors = {f"layer{i}": weights(run, shape, dtype, index + i) for i in range(3)}
    device = run.device
    ours = _selected(tensors, device, run.backend)
    require(ours == _selected(tensors, device, "reference"), "not the plain torch masks")
    require(ours == _selected(tensors, torch.device("cpu"), "auto"), "not the CPU's masks")
    return f"{len(tensors)} tensors"


def _selected(
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    device: torch.device,
    backend: str,
) -> list[list[bool]]:
    selector = TopKSelector(DENSITY, memory=256, backend=cast(Backend, backend))
    here = {name: [t.to(device) for t in tensor] for name, tensor in tensors.items()}
    done = False
    while not done:
        for name, (base, tuned, c) in here.items():
            selector.observe(name, base, tuned, c)
        done = selector.finish()
    masks = (selector.mask(name, base, tuned, c) for name, (base, tuned, c) in here.items())
    return [mask.flatten().tolist() for mask in masks]


def problem(run: Run, shape: Shape, index: int) -> tuple[Problem, torch.Tensor]:
    """A layer on the CPU, with inputs that leave the Gram far from diagonal, and its base."""
    rows, cols = shape
    generator = torch.Generator().manual_seed((run.seed + index) % 2**63)
    factors = max(1, cols // 4)
    mixing = torch.randn(cols, factors, generator=generator)
    x = torch.randn(2 * cols, factors, generator=generator) @ mixing.T
    x += 0.3 * torch.randn(2 * cols, cols, generator=generator)
    base = 0.02 * torch.randn(rows, cols, generator=generator)
    delta = 0.002 * torch.randn(rows, cols, generator=generator)
    mask = torch.rand(rows, cols, generator=generator) < (DENSITY, 0.4)[index % 2]
    return Problem(delta, mask, gram_of(x)), base


def hold_exact(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``decorate_exact`` at the minimum that dense float64 solves find, and its in-place form."""
    layer, base = problem(run, shape, index)
    damping = layer.damping(PERCDAMP)
    on_device = [tensor.to(run.device) for tensor in layer]
    result = decorate_exact(*on_device, percdamp=PERCDAMP, backend=run.backend)
    patch = result.patch.cpu()
    require(not bool(patch[~layer.mask].any()), "not zero outside the mask")
    found = objective(layer, patch, damping)
    least = objective(layer, optimum(layer, damping), damping)
    reverted = objective(layer, torch.zeros_like(patch), damping)
    # Less than a rounding of the reverted loss cannot be told from zero in float32.
    limit = (1 + TOL) * least + torch.finfo(torch.float32).eps * reverted
    require(found <= limit, f"loss {found:.6g}, the least is {least:.6g}")
    require(found <= objective(layer, bare(layer), damping) + limit - least, "above the bare mask")
    _hold_in_place(run, base, layer, dtype, exact=True)
    return f"{int(result.iterations)} iterations, {found / max(least, 1e-300) - 1:.1e} above least"


def hold_obs(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``decorate_obs`` beside a float64 sweep over single columns, and its in-place form."""
    layer, base = problem(run, shape, index)
    hessian = damped(layer.gram, layer.damping(PERCDAMP))
    nothing = torch.zeros_like(layer.delta)
    wide, *plain = (
        sweep(layer.delta, nothing, ~layer.mask, matrix, sign=-1)[0]
        for matrix in (hessian.double(), *_last_places(hessian.float()))
    )
    worst = max(plain, key=lambda found: (found.double() - wide).abs().max().item())
    on_device = [tensor.to(run.device) for tensor in layer]
    patch = decorate_obs(*on_device, percdamp=PERCDAMP, backend=run.backend).patch.cpu()
    require(not bool(patch[~layer.mask].any()), "not zero outside the mask")
    assert_within(patch, wide, worst)
    factor = factor_obs(on_device[2], percdamp=PERCDAMP, backend=run.backend)
    again = decorate_obs(*on_device, factor=factor).patch.cpu()
    require(torch.equal(again, patch), "another patch with the factor made apart")
    _hold_in_place(run, base, layer, dtype, exact=False)
    return ""


def _last_places(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """A symmetric matrix, and it with its last places changed: no stable method tells them apart.

    One sweep of a small layer is now and then exact by chance, which no other order of sums is.
    """
    yield matrix
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        up = torch.randint(-1, 2, matrix.shape, generator=generator).triu()
        yield matrix * (1 + torch.finfo(torch.float32).eps * (up + up.triu(1).T))


def _hold_in_place(
    run: Run, base: torch.Tensor, layer: Problem, dtype: torch.dtype, *, exact: bool
) -> None:
    """``decorate_*_`` writes ``base + patch``, rounded once; elsewhere the very words of base."""
    functional, in_place = (
        (decorate_exact, decorate_exact_) if exact else (decorate_obs, decorate_obs_)
    )
    before = base.to(run.device, dtype)
    weight = (base + layer.delta).to(run.device, dtype)
    mask, gram = layer.mask.to(run.device), layer.gram.to(run.device)
    delta = weight.float() - before.float()
    patch = functional(delta, mask, gram, percdamp=PERCDAMP, backend=run.backend).patch
    in_place(weight, before, mask, gram, percdamp=PERCDAMP, backend=run.backend)
    require(torch.equal(weight[~mask], before[~mask]), "base is changed outside the mask")
    wanted = before.double() + patch.double()
    plain = (before.float() + patch).to(dtype)
    assert_within(weight[mask], wanted[mask], plain[mask], dtype)


def hold_official(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``decorate_official``: plain torch's mask, and a float64 sweep on it with the other sign."""
    layer, base = problem(run, shape, index)
    before, tuned = base.to(dtype), (base + layer.delta).to(dtype)
    on_device = [tensor.to(run.device) for tensor in (before, tuned, layer.gram)]
    results = [
        decorate_official(*on_device, sparsity=1 - DENSITY, percdamp=PERCDAMP, backend=backend)
        for backend in (run.backend, "reference")
    ]
    ours, theirs = results
    # Scores that differ by less than a factorisation rounds may change places.
    moved = int((ours.mask != theirs.mask).sum())
    allowed = max(1, ours.mask.numel() // 10_000)
    require(moved <= allowed, f"{moved} weights differ from plain torch")
    hessian = damped(layer.gram, layer.damping(PERCDAMP))
    wide, plain = (
        sweep(tuned, before, ~ours.mask.cpu(), hessian.to(kind), sign=1)[0]
        for kind in (torch.float64, torch.float32)
    )
    assert_within(ours.weight.cpu(), wide, plain.to(dtype), dtype)
    return f"{moved} weights of plain torch's mask differ"


def hold_codec(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``encode_patch`` and ``apply_patch_``: the CPU's bytes, there and back."""
    torch.manual_seed(run.seed + index)
    pair = random_pair(shape, dtype, DENSITY if index % 2 else 0.5)
    only = torch.rand(shape) < 0.5 if index % 3 == 0 else None
    expected = encode_patch(*pair, only)
    base, tuned = (tensor.to(run.device) for tensor in pair)
    kept = None if only is None else only.to(run.device)
    patch = encode_patch(base, tuned, kept, backend=run.backend)
    for name, ours, theirs in zip(EncodedPatch._fields, patch, expected, strict=True):
        require(torch.equal(ours.cpu(), theirs), f"{name} is not the CPU's")
    target = base.clone()
    wanted = apply_patch_(pair[0].clone(), expected)
    apply_patch_(target, patch, backend=run.backend)
    require(torch.equal(raw(target).cpu(), raw(wanted)), "applied, not the CPU's words")
    apply_patch_(target, patch, backend=run.backend)
    require(torch.equal(raw(target), raw(base)), "reverted, not the base")
    return f"{patch.words.numel()} words"
