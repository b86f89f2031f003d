"""Every method of the table: how it makes a model, and the settings that it may choose from.

A choice is made on validation scenes. A method without one is asked as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from benchmarks.quality import baselines, sensitivities
from benchmarks.quality.baselines import State
from benchmarks.quality.bench import Bench
from tailor_fast import Recipe

Hyper = Mapping[str, Any]
Make = Callable[[Bench, float, Hyper], State]
Kind = Literal["anchor", "dense", "curve", "sparse", "paper", "ours"]

_SCALES = (1.0, 1.5, 2.0, 3.0)  # of kept deltas, where the method itself does not rescale
_SHRINKS = (0.4, 0.6, 0.8, 1.0)  # where it does
_SEEDS = (0, 1, 2)
_RETAIN_WEIGHTS = (0.03, 0.1, 0.3)
_REFIT_RETAIN_WEIGHTS = (0.03, 0.1, 0.2, 0.3)
_GRAFT_STEPS = 30


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: its name in tables and on the command line.
        kind: ``anchor``, ``dense`` and ``curve`` rows know no density; a ``curve`` is one point of
            a dense method's trade-off, for pictures.
        make: builds the model's state from a bench, a density and one setting.
        grid: the settings.
    """

    name: str
    kind: Kind
    make: Make
    grid: tuple[Hyper, ...] = ({},)

    @property
    def has_density(self) -> bool:
        """Whether the method keeps a given share of the weights."""
        return self.kind not in ("anchor", "dense", "curve")


def _grid(**axes: Iterable[Any]) -> tuple[Hyper, ...]:
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def _base(bench: Bench, _density: float, _hyper: Hyper) -> State:
    return bench.states[0]


def _tuned(bench: Bench, _density: float, _hyper: Hyper) -> State:
    return bench.states[1]


def _wise_ft(bench: Bench, _density: float, hyper: Hyper) -> State:
    return baselines.wise_ft(*bench.states, hyper["alpha"])


def _lines(bench: Bench, _density: float, hyper: Hyper) -> State:
    blocks = bench.family.blocks(bench.base)
    return baselines.lines(*bench.states, hyper["alpha"], blocks)


def _free(rule: Callable[..., State]) -> Make:
    def make(bench: Bench, density: float, hyper: Hyper) -> State:
        return rule(*bench.states, bench.names, density, **hyper)

    return make


def _della(bench: Bench, density: float, hyper: Hyper) -> State:
    # The window is given as a share of the density, so that one grid serves every density.
    chosen = {**hyper, "window": hyper["window"] * density}
    return baselines.della(*bench.states, bench.names, density, **chosen)


def _wanda(bench: Bench, density: float, hyper: Hyper) -> State:
    base, tuned = bench.states
    scores = {
        name: (tuned[name] - base[name]).abs() * norm for name, norm in bench.input_norms().items()
    }
    return baselines.keep_best(base, tuned, scores, density, per_row=True, **hyper)


def _fisher(bench: Bench, density: float, hyper: Hyper) -> State:
    base, tuned = bench.states
    scores = {
        name: (tuned[name] - base[name]).square() * fisher
        for name, fisher in bench.fisher().items()
    }
    return baselines.keep_best(base, tuned, scores, density, **hyper)


def _grafting(bench: Bench, density: float, hyper: Hyper) -> State:
    scores = sensitivities.graft(
        bench.tuned,
        bench.family,
        bench.new_batch,
        bench.states,
        bench.names,
        density=density,
        rate=hyper["rate"],
        steps=_GRAFT_STEPS,
    )
    return baselines.keep_best(*bench.states, scores, density, scale=hyper["scale"])


def _tailor(fixed: Mapping[str, Any], retain: bool) -> Make:
    def make(bench: Bench, density: float, hyper: Hyper) -> State:
        return bench.tailor(Recipe(density=density, **fixed, **hyper), retain=retain)

    return make


def _ours() -> list[Row]:
    """Ours: the defaults as they are; mask by score without and with old data; refitted mask."""
    rows = [
        Row("default", "ours", _tailor({}, retain=False)),
        Row("default-retain", "ours", _tailor({}, retain=True)),
    ]
    weights = (0.0, 0.5)  # ω
    alone = _grid(sensitivity=("obs", "weight", "diag"), salience_weight=weights)
    held = _grid(
        sensitivity=("obs", "ratio"), salience_weight=weights, retain_weight=_RETAIN_WEIGHTS
    )
    refitted = _grid(refits=(4,), retain_weight=_REFIT_RETAIN_WEIGHTS)
    for propagate in ("none", "sequential", "asymmetric"):
        fixed = {"propagate": propagate}
        rows += [
            Row(f"exact-{propagate}", "ours", _tailor(fixed, retain=False), alone),
            Row(f"exact-{propagate}-retain", "ours", _tailor(fixed, retain=True), held),
            Row(f"exact-{propagate}-refit", "ours", _tailor(fixed, retain=True), refitted),
        ]
    return rows


_OFFICIAL = {"decorate": "official", "propagate": "sequential", "group": "block"}
_OBS = {"decorate": "obs", "sensitivity": "weight"}
_MASK = {"decorate": "none", "sensitivity": "weight", "propagate": "none"}
ROWS = {
    row.name: row
    for row in (
        Row("base", "anchor", _base),
        Row("tuned", "anchor", _tuned),
        Row("wise-ft", "dense", _wise_ft, _grid(alpha=baselines.WISE_FT_GRID)),
        Row("wise-ft-0.5", "dense", _wise_ft, _grid(alpha=[0.5])),
        *(
            Row(f"wise-ft-{alpha:g}", "curve", _wise_ft, _grid(alpha=[alpha]))
            for alpha in baselines.WISE_FT_GRID
            if alpha not in (0.5, 1.0)
        ),
        Row("lines", "dense", _lines, _grid(alpha=(0.0, *baselines.WISE_FT_GRID))),
        Row("magnitude", "sparse", _free(baselines.magnitude), _grid(scale=_SCALES)),
        Row("dare", "sparse", _free(baselines.dare), _grid(seed=_SEEDS, scale=_SHRINKS)),
        Row("ties", "sparse", _free(baselines.ties_trim), _grid(scale=_SCALES)),
        Row(
            "breadcrumbs",
            "sparse",
            _free(baselines.breadcrumbs),
            _grid(outliers=(0.005, 0.01, 0.05), scale=_SCALES),
        ),
        Row(
            "della",
            "sparse",
            _della,
            _grid(seed=_SEEDS, window=(0.5, 0.9), scale=_SHRINKS),
        ),
        Row("wanda", "sparse", _wanda, _grid(scale=_SCALES)),
        Row("fisher", "sparse", _fisher, _grid(scale=_SCALES)),
        Row("grafting", "sparse", _grafting, _grid(rate=(1e5, 1e6, 1e7), scale=_SCALES)),
        Row(
            "official", "paper", _tailor(_OFFICIAL, retain=False), _grid(salience_weight=(0.5, 0.8))
        ),
        Row(
            "obs",
            "paper",
            _tailor(_OBS, retain=False),
            _grid(salience_weight=(0.0, 0.5, 0.8), propagate=("none", "sequential")),
        ),
        Row("mask", "paper", _tailor(_MASK, retain=False), _grid(salience_weight=(0.0, 0.5, 0.8))),
        *_ours(),
    )
}
