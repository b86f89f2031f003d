"""``kernels``: the card's two ceilings, then each op at the bars' shapes beside its baselines."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import holding, plan
from benchmarks.gpu.clock import Call
from benchmarks.gpu.floors import OPERATIONS, Ceilings, Cost
from benchmarks.gpu.holding import require
from benchmarks.gpu.plan import DENSITY, Entry
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import Row
from tailor_fast.ops.codec import apply_patch_, encode_patch
from tailor_fast.ops.gram import accumulate_cross_gram_, accumulate_gram_, accumulate_gram_diag_
from tailor_fast.ops.select import kept_count, select_patch, select_patches, topk_mask
from tailor_fast.testing import assert_within

COPY_BYTES, COPY_BYTES_DRY = 2**32, 2**16
MATRIX, MATRIX_DRY = 8192, 64
CHECKED = 64  # columns, or entries, of a result of full size that the gate computes in float64
SHARE_OF_MEMORY = 0.5  # of the free memory, for the streamed pair; two sets of masks join it


class Providers(NamedTuple):
    """Who does one piece of work: ours, and the baselines; the first one is what the bar names."""

    ours: Call
    baselines: dict[str, Call]


def run_part(run: Run, _given: argparse.Namespace) -> None:
    """Measure the ceilings, then every entry of the plan."""
    run.attempt(Row("copy"), partial(copy_ceiling, run))
    for unit in ("bf16", "tf32", "fp32"):
        run.attempt(Row("matmul", dtype=unit), partial(matmul_ceiling, run, unit))
    for entry in plan.kernel_entries(run.model, run.tokens):
        run.attempt(_row(entry, run.backend), partial(measure, run, entry, MAKERS[entry.work]))
    layers = 1 if run.dry else _layers_that_fit(run)
    for normalize in ("none", "row_block"):
        entry = plan.streamed(run.model, layers, normalize)
        run.attempt(_row(entry, run.backend), partial(measure, run, entry, make_streamed))


def copy_ceiling(run: Run) -> Iterator[Row]:
    """A copy within the device's memory; the bytes read and those written count."""
    words = (COPY_BYTES_DRY if run.dry else COPY_BYTES) // 4
    source = run.normal(words, generator=run.generator(1))
    target = torch.empty_like(source)
    seconds = run.clock.medians({"copy": lambda: target.copy_(source)})["copy"]
    moved = 2 * source.nbytes
    known = run.ceilings or Ceilings("measured", *(float("nan"),) * 4)
    run.ceilings = known._replace(copy=moved / seconds)
    note = f"{moved / seconds / 1e12:.3g} TB/s read and written"
    yield run.figure(
        Row("copy", f"{words} float32", "float32", "torch", note=note), seconds, Cost(moved)
    )


def matmul_ceiling(run: Run, unit: str) -> Iterator[Row]:
    """A square product of random numbers by the library."""
    size = MATRIX_DRY if run.dry else MATRIX
    dtype = torch.bfloat16 if unit == "bf16" else torch.float32
    generator = run.generator(2)
    a, b = (run.normal(size, size, generator=generator).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if unit == "tf32" else "highest")
    try:
        seconds = run.clock.medians({"matmul": lambda: a @ b})["matmul"]
    finally:
        torch.set_float32_matmul_precision(before)
    cost = Cost(3 * a.nbytes, OPERATIONS * size**3)._replace(unit=unit)  # type: ignore[arg-type]  # one of Unit
    if run.ceilings is not None:
        rates = run.ceilings._asdict() | {unit: cost.flops / seconds}
        run.ceilings = Ceilings(**rates)
    note = f"{cost.flops / seconds / 1e12:.4g} TFLOP/s"
    yield run.figure(Row("matmul", f"{size}^3", unit, "torch", note=note), seconds, cost)


def measure(run: Run, entry: Entry, make: Callable[[Run, Entry], Providers]) -> Iterator[Row]:
    """Rows of one entry; the maker has held the result to the truth before any time is taken."""
    providers = make(run, entry)
    calls = {run.backend: providers.ours, **providers.baselines}
    seconds = run.clock.medians(calls)
    against = next(iter(providers.baselines), None)
    for name, value in seconds.items():
        row = _row(entry, name)
        ratio = float("nan") if against is None else seconds[against] / value
        if name != run.backend:
            yield run.figure(row, value, entry.cost, ratio=ratio)
            continue
        row = replace(row, peak_bytes=run.clock.peak(providers.ours))
        note = "" if against is None else f"against {against}"
        yield run.figure(replace(row, note=note), value, entry.cost, ratio=ratio, bars=entry.bars)


def _row(entry: Entry, provider: str) -> Row:
    return Row(entry.work, entry.shape, entry.dtype, provider)


def _layers_that_fit(run: Run) -> int:
    """Blocks whose pairs fit in a part of the free memory: all of them on a large card."""
    free = int(torch.cuda.mem_get_info(run.device)[0] * SHARE_OF_MEMORY)
    ends = run.model.weights(0)
    per_block = run.model.weights(1) - ends
    return max(1, min(run.model.layers, (free // 4 - ends) // per_block))


def make_gram(run: Run, entry: Entry) -> Providers:
    """Triangular sum against the full product with float32 output and accumulation."""
    tokens, cols = entry.sizes
    x = holding.inputs(run, tokens, cols, torch.bfloat16, 3)
    total = torch.zeros(cols, cols, device=run.device)
    accumulate_gram_(total, x, backend=run.backend)
    part = x[:, :CHECKED]
    wide = part.double().T @ x.double()
    assert_within(total[:CHECKED], wide, part.float().T @ x.float())
    require(torch.equal(total, total.T), "not symmetric")
    full = torch.zeros_like(total)
    return Providers(
        lambda: accumulate_gram_(total, x, backend=run.backend),
        {
            "torch.addmm": lambda: _full_product(full, x, x),
            "torch float32": lambda: full.addmm_(x.float().T, x.float()),
        },
    )


def _full_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``total += x^T y`` as torch does it best, in place; CPUs have no such product of bfloat16."""
    if x.device.type == "cuda":
        out: torch.Tensor = torch.addmm(total, x.T, y, out_dtype=torch.float32, out=total)
        return out
    return total.addmm_(x.float().T, y.float())


def make_cross_gram(run: Run, entry: Entry) -> Providers:
    """Cross sum against the library's product."""
    tokens, cols = entry.sizes
    x, y = (holding.inputs(run, tokens, cols, torch.bfloat16, key) for key in (4, 5))
    total = torch.zeros(cols, cols, device=run.device)
    accumulate_cross_gram_(total, x, y, backend=run.backend)
    part = x[:, :CHECKED]
    assert_within(total[:CHECKED], part.double().T @ y.double(), part.float().T @ y.float())
    full = torch.zeros_like(total)
    return Providers(
        lambda: accumulate_cross_gram_(total, x, y, backend=run.backend),
        {"torch.addmm": lambda: _full_product(full, x, y)},
    )


def make_gram_diag(run: Run, entry: Entry) -> Providers:
    """One read of the inputs against eager torch."""
    tokens, cols = entry.sizes
    x = holding.inputs(run, tokens, cols, torch.bfloat16, 6)
    total = accumulate_gram_diag_(torch.zeros(cols, device=run.device), x, backend=run.backend)
    part = x[:, :CHECKED]
    assert_within(total[:CHECKED], part.double().square().sum(0), part.float().square().sum(0))
    eager = torch.zeros_like(total)
    return Providers(
        lambda: accumulate_gram_diag_(total, x, backend=run.backend),
        {"torch": lambda: eager.add_(x.float().square().sum(0))},
    )


def make_select(run: Run, entry: Entry) -> Providers:
    """The fused pass against scores in memory and torch's own selection."""
    base, tuned, c = holding.weights(run, entry.sizes, torch.bfloat16, 7)  # type: ignore[arg-type]  # two sizes
    k = kept_count(base.numel(), DENSITY)

    def ours() -> torch.Tensor:
        return select_patch(base, tuned, c, density=DENSITY, backend=run.backend)

    expected = select_patch(base, tuned, c, density=DENSITY, backend="reference")
    require(torch.equal(ours(), expected), "not the plain torch mask")
    return Providers(
        ours,
        {
            "torch.topk": lambda: by_topk(scores(base, tuned, c), k),
            "torch.sort": lambda: by_sort(scores(base, tuned, c), k),
        },
    )


def scores(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The default score in eager torch: z-scores of ``|D|`` and ``D^2 c`` within 128 columns."""
    delta = tuned.float() - base.float()
    return 0.5 * _standardise(delta.abs()) + 0.5 * _standardise(delta.square() * c)


def _standardise(x: torch.Tensor) -> torch.Tensor:
    whole = x.shape[1] - x.shape[1] % 128
    parts = [x[:, :whole].unflatten(1, (-1, 128)), x[:, None, whole:]]
    done = [(p - p.mean(2, keepdim=True)) / p.std(2, keepdim=True) for p in parts if p.numel()]
    return torch.cat([part.flatten(1) for part in done], 1)


def by_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest by ``torch.topk`` and a scatter."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[torch.topk(values.flatten(), k, sorted=False).indices] = True
    return mask.view_as(values)


def by_sort(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mask by one element of a full sort, as the authors' code does it."""
    return values >= torch.sort(values.flatten())[0][values.numel() - k]


def make_topk(run: Run, entry: Entry) -> Providers:
    """Scores that are in memory already."""
    values = run.normal(*entry.sizes, generator=run.generator(8))
    k = kept_count(values.numel(), DENSITY)
    mask = topk_mask(values, k, backend=run.backend)
    require(torch.equal(mask, topk_mask(values, k, backend="reference")), "not plain torch's mask")
    return Providers(
        lambda: topk_mask(values, k, backend=run.backend),
        {"torch.topk": lambda: by_topk(values, k), "torch.sort": lambda: by_sort(values, k)},
    )


def make_streamed(run: Run, entry: Entry) -> Providers:
    """All weights of a model in one call: larger than any cache, so cold by itself."""
    salience = entry.work == "select salience"
    pairs = [
        holding.weights(run, shape, torch.bfloat16, key)
        for key, shape in enumerate(run.model.matrices(entry.sizes[0]))
    ]
    torch.cuda.empty_cache()
    options: dict[str, Any] = {
        "density": DENSITY,
        "salience_weight": 1.0 if salience else 0.5,
        "normalize": "none" if salience else "row_block",
    }

    def ours() -> list[torch.Tensor]:
        bases, tuneds, weights = zip(*pairs, strict=True)
        given = None if salience else weights
        return select_patches(bases, tuneds, given, **options, backend=run.backend)

    def singly() -> list[torch.Tensor]:
        return [
            select_patch(base, tuned, None if salience else c, **options, backend=run.backend)
            for base, tuned, c in pairs
        ]

    base, tuned, c = pairs[0]
    expected = select_patch(base, tuned, None if salience else c, **options, backend="reference")
    together, apart = ours(), singly()
    require(torch.equal(together[0], expected), "not plain torch's mask")
    alike = all(map(torch.equal, together, apart))
    require(alike, "not the masks of one tensor at a time")
    del together, apart
    return Providers(ours, {"one by one": singly})


def _codec_pair(run: Run, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 weights, and the same with a tenth of them moved by half."""
    generator = run.generator(9)
    base = run.normal(*entry.sizes, generator=generator).bfloat16()
    drawn = torch.rand(entry.sizes, generator=generator, device=run.device)
    return base, torch.where(drawn < DENSITY, base * 1.5, base)


def make_encode(run: Run, entry: Entry) -> Providers:
    """Encoding against the usual sparse form: positions and values."""
    base, tuned = _codec_pair(run, entry)
    patch = encode_patch(base, tuned, backend=run.backend)
    for ours, theirs in zip(patch, encode_patch(base, tuned, backend="reference"), strict=True):
        require(torch.equal(ours, theirs), "not plain torch's patch")

    def sparse() -> tuple[torch.Tensor, torch.Tensor]:
        index = (base.view(torch.int16) != tuned.view(torch.int16)).view(-1).nonzero().view(-1)
        return index, tuned.view(-1)[index]

    return Providers(
        lambda: encode_patch(base, tuned, backend=run.backend), {"nonzero, gather": sparse}
    )


def make_apply(run: Run, entry: Entry) -> Providers:
    """Applying in place against ``index_copy_`` of positions and values."""
    base, tuned = _codec_pair(run, entry)
    patch = encode_patch(base, tuned, backend=run.backend)
    target = apply_patch_(base.clone(), patch, backend=run.backend)
    require(torch.equal(target.view(torch.int16), tuned.view(torch.int16)), "not the tuned words")
    index = (base.view(torch.int16) != tuned.view(torch.int16)).view(-1).nonzero().view(-1)
    values, other = tuned.view(-1)[index], base.clone().view(-1)
    return Providers(
        lambda: apply_patch_(target, patch, backend=run.backend),
        {"index_copy_": lambda: other.index_copy_(0, index, values)},
    )


MAKERS: dict[str, Callable[[Run, Entry], Providers]] = {
    "select tensor": make_select,
    "topk_mask": make_topk,
    "gram": make_gram,
    "cross_gram": make_cross_gram,
    "gram_diag": make_gram_diag,
    "encode_patch": make_encode,
    "apply_patch_": make_apply,
}
