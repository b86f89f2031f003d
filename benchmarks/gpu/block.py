"""``block``: the seven linears of one block, Grams given, beside the authors' algorithm.

Layers that share an input are solved as one stack of rows by ``exact`` and ``obs``, for which rows
are independent; ``official`` and the authors take one layer after the other, because their masks
rank a whole layer.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks.authors import AuthorsOptions, authors_fasterprune
from benchmarks.gpu import floors, holding, kernels, plan
from benchmarks.gpu.holding import require
from benchmarks.gpu.plan import DENSITY, PERCDAMP, Linear
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import Row
from tailor_fast.ops.decorate import Decorated, decorate_exact, decorate_obs, decorate_official
from tailor_fast.ops.select import select_patch, select_patches
from tailor_fast.testing import assert_within
from tests.ops.decorate.problems import sweep

CHECKED = 4  # rows of each stack that the gate computes in float64
GATES, GATES_DRY = [(64, 300), (130, 384)], [(3, 40)]
DTYPE = "bfloat16"
AUTHORS = "authors, eager"


@dataclass
class Layer:
    """One linear layer: its weights and the mask of the default recipe."""

    linear: Linear
    base: torch.Tensor
    tuned: torch.Tensor
    mask: torch.Tensor


@dataclass
class Stack:
    """Layers of one input: their Gram, deltas and masks one below the other."""

    gram: torch.Tensor  # [cols, cols]
    column_weight: torch.Tensor  # [cols]
    layers: list[Layer] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``q k v``."""
        return " ".join(layer.linear.name.removesuffix("_proj") for layer in self.layers)

    def join(self) -> None:
        """Stack the deltas and masks once all layers are in."""
        deltas = [layer.tuned.float() - layer.base.float() for layer in self.layers]
        self.delta = torch.cat(deltas)
        self.mask = torch.cat([layer.mask for layer in self.layers])


Solve = Callable[[Stack], Decorated]


def run_part(run: Run, _given: argparse.Namespace) -> None:
    """Gate, ceilings, the authors, then each mode."""
    gates = (holding.hold_exact, holding.hold_obs, holding.hold_official)
    for hold, name in zip(gates, ("exact", "obs", "official"), strict=True):
        for index, shape in enumerate(GATES_DRY if run.dry else GATES):
            row = Row(f"gate {name}", str(list(shape)), "float32", run.backend)
            run.attempt(row, partial(_gate, run, hold, shape, index, row))
    run.attempt(Row("copy"), partial(kernels.copy_ceiling, run))
    for unit in ("bf16", "tf32", "fp32"):
        run.attempt(Row("matmul", dtype=unit), partial(kernels.matmul_ceiling, run, unit))
    part = Block(run)
    for work, case in (
        ("problem", part.make),
        ("authors", part.authors),
        ("select", part.select),
        ("exact", part.exact),
        ("obs factor", part.factor),
        ("obs", part.obs),
        ("official", part.official),
    ):
        provider = AUTHORS if work == "authors" else run.backend
        run.attempt(Row(work, part.shape, DTYPE, provider), case)


def _gate(
    run: Run,
    hold: Callable[[Run, holding.Shape, torch.dtype, int], str],
    shape: holding.Shape,
    index: int,
    row: Row,
) -> Iterator[Row]:
    note = hold(run, shape, torch.float32, index)
    yield replace(row, note=f"held; {note}".rstrip("; "))


class Block:
    """The problem, and its cases in the order in which they run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stacks: dict[str, Stack] = {}
        self._seconds: dict[str, float] = {}
        self.shape = f"{run.model.name} block"

    def make(self) -> Iterator[Row]:
        """Random weights; inputs with a quarter as many factors as columns."""
        run = self._run
        for key, (name, cols) in enumerate(run.model.inputs.items()):
            gram = _gram(run, cols, key)
            # The vector of sensitivity obs: one over the diagonal of the damped inverse.
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram)))
            self._stacks[name] = Stack(gram, inverse.diagonal().reciprocal().float())
            del inverse
        for key, linear in enumerate(run.model.linears):
            stack = self._stacks[linear.input]
            shape = (linear.rows, linear.cols)
            base, tuned, _ = holding.weights(run, shape, torch.bfloat16, key)
            mask = select_patch(
                base, tuned, stack.column_weight, density=DENSITY, backend="reference"
            )
            stack.layers.append(Layer(linear, base, tuned, mask))
        for stack in self._stacks.values():
            stack.join()
        weights = sum(linear.rows * linear.cols for linear in run.model.linears)
        yield Row("problem", self.shape, DTYPE, note=f"{weights} weights, density {DENSITY}")

    def authors(self) -> Iterator[Row]:
        """Their ``fasterprune`` layer after layer, each once: seconds each, and launch-bound."""
        run, total = self._run, 0.0
        options = AuthorsOptions(sparsity=1 - DENSITY, percdamp=PERCDAMP)
        base, tuned = (torch.randn(8, 128, device=run.device) for _ in range(2))
        authors_fasterprune(base, tuned, torch.eye(128, device=run.device), options)  # warm
        for stack, layer in self._layers():
            base, tuned = layer.base.float(), layer.tuned.float()
            call = partial(authors_fasterprune, base, tuned, stack.gram, options)
            seconds = run.clock.once(call)
            total += seconds
            yield Row("authors", layer.linear.name, "float32", AUTHORS, seconds=seconds)
        self._seconds["authors"] = total
        yield Row("authors", self.shape, "float32", AUTHORS, seconds=total, ratio=1.0)

    def select(self) -> Iterator[Row]:
        """The seven masks of the default recipe; score vectors given."""
        run = self._run

        layers = [layer for _, layer in self._layers()]
        bases, tuneds = ([getattr(la, side) for la in layers] for side in ("base", "tuned"))
        weights = [stack.column_weight for stack, _ in self._layers()]

        def masks() -> list[torch.Tensor]:
            return select_patches(bases, tuneds, weights, density=DENSITY, backend=run.backend)

        for ours, (_, layer) in zip(masks(), self._layers(), strict=True):
            require(torch.equal(ours, layer.mask), f"{layer.linear.name}: not plain torch's mask")
        seconds = self._timed("select", masks)
        cost = floors.Cost(0)
        for linear in run.model.linears:
            cost += floors.select(linear.rows * linear.cols, 2, linear.cols)
        yield run.figure(self._row("select"), seconds, cost)

    def exact(self) -> Iterator[Row]:
        """The minimiser of each stack; spot-checked against dense float64 solves."""
        run = self._run

        def solve(stack: Stack) -> Decorated:
            return decorate_exact(
                stack.delta, stack.mask, stack.gram, percdamp=PERCDAMP, backend=run.backend
            )

        iterations = 0
        for stack in self._stacks.values():
            result = solve(stack)
            _check_minimum(stack, result.patch)
            iterations = max(iterations, int(result.iterations))
        yield from self._stages("exact", solve, plan.block_cost(run.model, "exact", iterations))

    def factor(self) -> Iterator[Row]:
        """What ``obs`` spends on factorising the Gram of each stack, by the function it calls."""
        run = self._run
        module = importlib.import_module(f"tailor_fast.ops.decorate.{run.backend}.sweep")
        grams = [stack.gram for stack in self._stacks.values()]
        seconds = self._timed(
            "factor", lambda: [module.factorize(gram, PERCDAMP) for gram in grams]
        )
        row = replace(self._row("obs factor"), note=f"{len(grams)} Grams")
        yield run.figure(row, seconds, plan.factor_cost(run.model))

    def obs(self) -> Iterator[Row]:
        """The sweep of each stack, factorisation included; then less the factorisation."""
        run = self._run

        def solve(stack: Stack) -> Decorated:
            return decorate_obs(
                stack.delta, stack.mask, stack.gram, percdamp=PERCDAMP, backend=run.backend
            )

        for stack in self._stacks.values():
            _check_sweep(stack, solve(stack).patch)
        factored = plan.factor_cost(run.model)
        # Its operations, done by another unit, have a row of their own.
        cost = plan.block_cost(run.model, "obs") + floors.Cost(factored.bytes)
        yield from self._stages("obs", solve, cost)
        sweep = self._seconds["obs"] - self._seconds["factor"]
        row = replace(self._row("obs sweep"), note="obs less obs factor")
        cost = plan.block_cost(run.model, "obs")
        yield run.figure(row, sweep, cost, bars=plan.BLOCK_BARS["obs sweep"])

    def official(self) -> Iterator[Row]:
        """The authors' algorithm to the letter, by our kernels."""
        run = self._run

        def solve() -> None:
            for stack, layer in self._layers():
                decorate_official(
                    layer.base,
                    layer.tuned,
                    stack.gram,
                    sparsity=1 - DENSITY,
                    percdamp=PERCDAMP,
                    backend=run.backend,
                )

        seconds = self._timed("official", solve)
        row = replace(self._row("official"), peak_bytes=run.clock.peak(solve))
        yield run.figure(row, seconds, ratio=self._ratio(seconds))

    def _stages(self, mode: str, solve: Solve, cost: floors.Cost) -> Iterator[Row]:
        """One row per stack, one for the block, one with the selection before it."""
        run = self._run
        stacks = list(self._stacks.values())
        calls = {stack.name: partial(solve, stack) for stack in stacks}
        for name, seconds in run.clock.medians(calls).items():
            yield Row(f"{mode} stage", name, DTYPE, run.backend, seconds=seconds)

        def whole() -> None:
            for stack in stacks:
                solve(stack)

        seconds = self._timed(mode, whole)
        row = replace(self._row(mode), peak_bytes=run.clock.peak(whole))
        ratio, bars = self._ratio(seconds), plan.BLOCK_BARS[mode]
        yield run.figure(row, seconds, cost, ratio=ratio, bars=bars)
        both = seconds + self._seconds.get("select", float("nan"))
        yield replace(self._row(f"select and {mode}"), seconds=both, ratio=self._ratio(both))

    def _timed(self, name: str, call: Callable[[], object]) -> float:
        self._seconds[name] = self._run.clock.medians({name: call})[name]
        return self._seconds[name]

    def _ratio(self, seconds: float) -> float:
        return self._seconds.get("authors", float("nan")) / seconds

    def _row(self, work: str) -> Row:
        return Row(work, self.shape, DTYPE, self._run.backend)

    def _layers(self) -> Iterator[tuple[Stack, Layer]]:
        for stack in self._stacks.values():
            for layer in stack.layers:
                yield stack, layer


def _gram(run: Run, cols: int, key: int) -> torch.Tensor:
    """Mean Gram of correlated inputs, exactly symmetric."""
    generator = run.generator(cols, key)
    mixing = run.normal(cols, cols // 4, generator=generator)
    x = run.normal(2 * cols, cols // 4, generator=generator) @ mixing.T
    x += 0.3 * run.normal(2 * cols, cols, generator=generator)
    gram = x.T @ x / len(x)
    return (gram + gram.T) / 2


def _damped(gram: torch.Tensor) -> torch.Tensor:
    damped = gram.double()
    damped.diagonal().add_(PERCDAMP * damped.diagonal().mean())
    return damped


def _checked_rows(patch: torch.Tensor) -> range:
    return range(0, len(patch), -(-len(patch) // CHECKED))


def _check_sweep(stack: Stack, patch: torch.Tensor) -> None:
    """The gate at full size: some rows against a float64 sweep over single columns."""
    require(not bool(patch[~stack.mask].any()), f"{stack.name}: not zero outside the mask")
    rows = list(_checked_rows(patch))
    delta, revert = stack.delta[rows], ~stack.mask[rows]
    damped = _damped(stack.gram)
    wide, plain = (
        sweep(delta, torch.zeros_like(delta), revert, damped.to(kind), sign=-1)[0]
        for kind in (torch.float64, torch.float32)
    )
    assert_within(patch[rows], wide, plain)


def _check_minimum(stack: Stack, patch: torch.Tensor) -> None:
    """The gate at full size: some rows against dense float64 solves."""
    require(not bool(patch[~stack.mask].any()), f"{stack.name}: not zero outside the mask")
    damped = _damped(stack.gram)
    for row in _checked_rows(patch):
        kept = stack.mask[row].nonzero()[:, 0]
        delta = stack.delta[row].double()
        best = torch.zeros_like(delta)
        best[kept] = torch.linalg.solve(damped[kept][:, kept], (damped @ delta)[kept])
        loss, least = (
            float((delta - values) @ damped @ (delta - values))
            for values in (patch[row].double(), best)
        )
        require(
            loss <= (1 + holding.TOL) * least,
            f"{stack.name}: row {row} has loss {loss:.6g}, the least is {least:.6g}",
        )
