"""Every method that makes one model of several fine-tunes, and its settings to choose from.

The joint solve runs through ``stitch_checkpoints`` on the checkpoints, with statistics files that
``calibrate`` writes; single patches are those of ``patch_checkpoint`` on the same files.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality import scenes, stitching_rules, tinyllava
from benchmarks.quality.baselines import State
from benchmarks.quality.bench import PROMPTS
from benchmarks.quality.evaluation import (
    TEST_SEED,
    VALIDATION_SEED,
    changed_share,
    tuned_linears,
)
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.protocols import (
    NEW_SAMPLES,
    OLD_SAMPLES_PER_TASK,
    PROTOCOLS,
    Protocol,
)
from benchmarks.quality.scenes import OLD_TASKS, Split
from benchmarks.quality.training import Made
from tailor_fast import (
    Recipe,
    RunOptions,
    Task,
    calibrate,
    patch_checkpoint,
    stitch_checkpoints,
)
from tailor_fast.patchfile import diff_checkpoints
from tailor_fast.patching.recipe import DEFAULT_REFITS

FAMILY = FAMILIES["llava"]


def _with_task(protocol: Protocol, task: str) -> Protocol:
    tuned = replace(protocol.finetuning, task=task)
    return replace(protocol, name=f"hard-{task}", finetuning=tuned)


_CODE, _NEXT = PROTOCOLS["hard-code"], PROTOCOLS["hard-next"]
_FOUR = (_CODE, _NEXT, _with_task(_NEXT, "twice"), _with_task(_CODE, "mirror"))
GROUPS: Mapping[str, tuple[Protocol, ...]] = {"two": _FOUR[:2], "four": _FOUR}
DENSITIES = (0.05, 0.1)

Hyper = Mapping[str, Any]
_STEPS = tuple(step / 10 for step in range(1, 11))
_SCALES = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
_WIDE = (*DENSITIES, 0.2, 0.5)  # published rules may keep more
_RETAIN = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_OPTIONS = RunOptions(samples=None, batch_size=128)


class Bench:
    """A base, its fine-tunes, their calibration files, and the questions of both splits.

    Args:
        base: the base checkpoint.
        tuned: the fine-tuned ones, by task.
        seed: of the calibration scenes, which are training scenes.
        work: folder for what is made here.
    """

    def __init__(self, base: Made, tuned: Mapping[str, Made], seed: int, work: Path) -> None:
        self._base, self._tuned, self._seed, self._work = base, tuned, seed, work
        self.tasks = tuple(tuned)
        self._model = FAMILY.load(base.folder)
        self.base: State = {k: v.clone() for k, v in self._model.state_dict().items()}
        models = [FAMILY.load(made.folder) for made in tuned.values()]
        self.tuned: list[State] = [model.state_dict() for model in models]
        found = [tuned_linears(FAMILY.load(base.folder), model) for model in models]
        self._linears = sorted({name for names in found for name in names})
        self._count = 0
        self.patch = cache(self._patch)  # one bench lives as long as its process
        self._questions = cache(self._asked)

    @cached_property
    def statistics(self) -> dict[str, Path]:
        """Files of ``calibrate``: each fine-tune's on its task, the base's on the old tasks."""
        tasks = [(task, made, [task], NEW_SAMPLES) for task, made in self._tuned.items()]
        files = {}
        for name, made, shown, count in [
            *tasks,
            ("old", self._base, list(OLD_TASKS), OLD_SAMPLES_PER_TASK),
        ]:
            data = self._work / f"{name}.jsonl"
            scenes.write([scenes.draw(task, "train", count, self._seed) for task in shown], data)
            files[name] = self._work / f"{name}.stats.safetensors"
            calibrate(made.folder, data, files[name], options=_OPTIONS)
        return files

    def stitch(self, tasks: Mapping[str, Task], recipe: Recipe, **options: Any) -> State:
        """The state of what ``stitch_checkpoints`` writes."""
        out = self._fresh()
        stitch_checkpoints(self._base.folder, tasks, out, recipe, **options)
        return self._read(out)

    def joint(self, recipe: Recipe, support: str, *, retain: bool) -> State:
        """The joint solve from the fine-tuned checkpoints."""
        tasks = {
            task: Task(made.folder, statistics=self.statistics[task])
            for task, made in self._tuned.items()
        }
        return self.stitch(tasks, recipe, support=support, retain=self._old(retain))

    def surrogate(self, recipe: Recipe, single: float, *, retain: bool) -> State:
        """The joint solve from single patches: what each made of its task stands for it.

        Args:
            recipe: of the joint solve; its density is that of the patches.
            single: weight of old data in the patches.
            retain: whether old data are used.
        """
        tasks = {
            task: Task(
                patch=self.patch(task, recipe.density, single, retain)[1],
                statistics=self.statistics[task],
            )
            for task in self._tuned
        }
        return self.stitch(tasks, recipe, retain=self._old(retain))

    def _patch(
        self, task: str, density: float, retain_weight: float, retain: bool
    ) -> tuple[State, Path]:
        """One task's patched model by ``patch_checkpoint``, and its patch file."""
        out = self._fresh()
        recipe = Recipe(density=density, propagate="none", retain_weight=retain_weight)
        patch_checkpoint(
            self._base.folder,
            self._tuned[task].folder,
            out,
            recipe,
            statistics=self.statistics[task],
            retain=self._old(retain),
        )
        file = out.with_suffix(".tailor.safetensors")
        diff_checkpoints(self._base.folder, out, file)
        return self._read(out), file

    def scores(self, state: State, split: Split) -> dict[str, float]:
        """Percent right of every task."""
        self._model.load_state_dict(state)
        return {
            task: 100 * FAMILY.right(self._model, batch).double().mean().item()
            for task, batch in self._questions(split).items()
        }

    def changed(self, state: State) -> float:
        """Share of the linear weights of all fine-tunes that differ from the base, 0 to 1."""
        return changed_share(self.base, state, self._linears)

    def _old(self, retain: bool) -> Path | None:
        return self.statistics["old"] if retain else None

    def _fresh(self) -> Path:
        self._count += 1
        return self._work / f"out-{self._count}"

    def _read(self, folder: Path) -> State:
        state: State = FAMILY.load(folder).state_dict()
        return state

    def _asked(self, split: Split) -> dict[str, tinyllava.Batch]:
        seed = TEST_SEED if split == "test" else VALIDATION_SEED
        return {
            task: tinyllava.encode([scenes.draw(task, split, PROMPTS[split], seed)])
            for task in (*OLD_TASKS, *self._tuned)
        }


@dataclass(frozen=True)
class Row:
    """One method: how it makes a state from a bench and a setting, and the settings.

    A setting with ``density`` is compared at each of ``DENSITIES``, and all of them together.
    """

    make: Callable[[Bench, Hyper], State]
    grid: tuple[Hyper, ...] = ({},)


def _grid(**axes: Iterable[Any]) -> tuple[Hyper, ...]:
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def _rule(rule: Callable[..., State], grid: tuple[Hyper, ...]) -> Row:
    return Row(lambda bench, hyper: rule(bench.base, bench.tuned, **hyper), grid)


def _patches(*, mean: bool, retain: bool) -> Row:
    def make(bench: Bench, hyper: Hyper) -> State:
        weight = hyper.get("retain_weight", 0.1)
        single = [bench.patch(task, hyper["density"], weight, retain)[0] for task in bench.tasks]
        scale = 1 / len(single) if mean else 1.0
        return stitching_rules.task_arithmetic(bench.base, single, scale)

    return Row(make, _grid(density=DENSITIES, **({"retain_weight": _RETAIN} if retain else {})))


def _joint(support: str, retain: bool) -> Row:
    axes: dict[str, Iterable[Any]] = {"density": DENSITIES, "salience_weight": (0.0, 0.5)}
    if retain:
        axes["retain_weight"] = _RETAIN
    return Row(lambda b, hyper: b.joint(Recipe(**hyper), support, retain=retain), _grid(**axes))


def _refitted(support: str) -> Row:
    grid = _grid(density=DENSITIES, retain_weight=_RETAIN)
    return Row(lambda b, hyper: b.joint(Recipe(**hyper), support, retain=True), grid)


def _surrogate(*, retain: bool, refits: int) -> Row:
    def make(bench: Bench, hyper: Hyper) -> State:
        weight = hyper.get("retain_weight", 0.1)
        return bench.surrogate(Recipe(**hyper, refits=refits), weight, retain=retain)

    return Row(make, _grid(density=DENSITIES, **({"retain_weight": _RETAIN} if retain else {})))


ROWS: Mapping[str, Row] = {
    "base": Row(lambda bench, _: bench.base),
    **{
        f"tuned-{protocol.finetuning.task}": Row(lambda bench, _, at=at: bench.tuned[at])  # type: ignore[misc]  # its default binds now
        for at, protocol in enumerate(_FOUR)
    },
    "task-arithmetic": _rule(stitching_rules.task_arithmetic, _grid(scale=_STEPS)),
    "magmax": _rule(stitching_rules.magmax, _grid(scale=_STEPS)),
    "ties": _rule(stitching_rules.ties, _grid(density=_WIDE, scale=_SCALES)),
    "dare-ties": _rule(
        stitching_rules.dare_ties, _grid(density=_WIDE, scale=(0.2, *_SCALES[:4]), seed=(0, 1, 2))
    ),
    "pcb": _rule(stitching_rules.pcb, _grid(density=_WIDE, scale=_SCALES)),
    "patches-mean": _patches(mean=True, retain=False),
    "patches-sum": _patches(mean=False, retain=False),
    "patches-mean-retain": _patches(mean=True, retain=True),
    "patches-sum-retain": _patches(mean=False, retain=True),
    "surrogate": _surrogate(retain=False, refits=0),
    "surrogate-retain": _surrogate(retain=True, refits=0),
    "surrogate-refit-retain": _surrogate(retain=True, refits=DEFAULT_REFITS),
    **{
        f"joint-{support}{'-retain' if retain else ''}": _joint(support, retain)
        for retain in (False, True)
        for support in ("union", "best")
    },
    **{f"refit-{support}-retain": _refitted(support) for support in ("union", "best")},
}
