"""``python -m benchmarks.quality.sequence``: four new tasks, learned one after the other.

Plain sequential fine-tuning goes on from what it has; the other arm repairs the model after every
task, with the last repaired model as base and samples of everything learned before as old data.
"""

import argparse
import csv
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.quality import scenes, tinyllava, training
from benchmarks.quality.bench import PROMPTS, labelled
from benchmarks.quality.evaluation import TEST_SEED
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.protocols import NEW_SAMPLES, OLD_SAMPLES_PER_TASK
from benchmarks.quality.scenes import OLD_TASKS
from benchmarks.quality.training import FINETUNING, Finetuning, Made, Pretraining, Report
from benchmarks.results import ROOT
from tailor_fast import Recipe, tailor_model

FAMILY = FAMILIES["llava"]
STAGES = (
    FINETUNING["code"],
    FINETUNING["next"],
    replace(FINETUNING["next"], task="twice"),
    replace(FINETUNING["code"], task="mirror"),
)
ARMS = ("fine-tuning alone", "repaired after each task")
OUT = ROOT / "results" / "quality" / "sequence.csv"


class Accuracy(NamedTuple):
    """Percent right of one task after one stage, counted from 1; stage 0 is the base model."""

    arm: str
    seed: int
    stage: int
    task: str
    percent: float


def _scores(model: torch.nn.Module, tasks: Sequence[str]) -> dict[str, float]:
    right = {
        task: FAMILY.right(
            model, tinyllava.encode([scenes.draw(task, "test", PROMPTS["test"], TEST_SEED)])
        )
        for task in tasks
    }
    return {task: 100 * hits.double().mean().item() for task, hits in right.items()}


def _repaired(before: Made, tuned: Made, task: str, known: Sequence[str], folder: Path) -> Made:
    """Patch ``before`` towards ``tuned``, held to what it answers on the ``known`` tasks."""

    def data(name: str, count: int) -> dict[str, torch.Tensor]:
        return labelled(FAMILY, tinyllava.encode([scenes.draw(name, "train", count, 0)]))

    done = tailor_model(
        FAMILY.load(before.folder),
        FAMILY.load(tuned.folder),
        [data(task, NEW_SAMPLES)],
        Recipe(),
        retain_batches=[data(name, OLD_SAMPLES_PER_TASK) for name in known],
    )
    FAMILY.save(done.model, folder)
    made_of = f"repaired {before.fingerprint} {tuned.fingerprint}"
    return Made(folder, 0.0, hashlib.sha256(made_of.encode()).hexdigest())


def run(
    work: Path, base: Made, stages: Sequence[Finetuning], seed: int, report: Report = print
) -> list[Accuracy]:
    """Learn the tasks of ``stages`` in turn, both ways, and measure every task after each.

    Args:
        work: folder of the checkpoints.
        base: what both ways start from.
        stages: how each task is learned; their seeds are replaced.
        seed: of the fine-tuning.
        report: called with a line of progress at a time.
    """
    new = [stage.task for stage in stages]
    found = []
    for arm in ARMS:
        now, known = base, list(OLD_TASKS)
        for number in range(len(stages) + 1):
            if number:
                stage = replace(stages[number - 1], seed=seed)
                folder = work / f"sequence-{seed}-{ARMS.index(arm)}-{number}"
                tuned = training.make_tuned(now, folder, stage, report)
                if arm == ARMS[1]:
                    folder = folder.with_name(f"{folder.name}-repaired")
                    tuned = _repaired(now, tuned, stage.task, known, folder)
                now = tuned
                known.append(stage.task)
            scores = _scores(FAMILY.load(now.folder), [*OLD_TASKS, *new])
            found += [Accuracy(arm, seed, number, task, value) for task, value in scores.items()]
            report(f"{arm}, seed {seed}, stage {number}: {scores}")
    return found


def save(found: Sequence[Accuracy], path: Path) -> None:
    """Write a line for each accuracy."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Accuracy._fields)
        table.writerows([*one[:-1], f"{one.percent:.2f}"] for one in found)


def load(path: Path) -> list[Accuracy]:
    """Read them back."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Accuracy(
                line["arm"],
                int(line["seed"]),
                int(line["stage"]),
                line["task"],
                float(line["percent"]),
            )
            for line in csv.DictReader(file)
        ]


def figures(found: Sequence[Accuracy], arm: str, seed: int) -> Mapping[str, float]:
    """Return what one arm has in the end, percent.

    ``old`` is the mean over the old tasks, ``average`` the mean over the new ones, both after the
    last stage; ``transfer`` is the mean change of each new task but the last since it was learned,
    the backward transfer.
    """
    table = {(a.stage, a.task): a.percent for a in found if (a.arm, a.seed) == (arm, seed)}
    last = max(stage for stage, _ in table)
    new = list(dict.fromkeys(task for _, task in table if task not in OLD_TASKS))
    changes = [table[last, task] - table[at, task] for at, task in enumerate(new[:-1], 1)]
    return {
        "old": statistics.fmean(table[last, task] for task in OLD_TASKS if (last, task) in table),
        "average": statistics.fmean(table[last, task] for task in new),
        "transfer": statistics.fmean(changes),
    }


def main() -> None:
    """Parse the command line, run, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sequence")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = training.make_base(arguments.work / "llava-0", Pretraining())
    found = [one for seed in arguments.seeds for one in run(arguments.work, base, STAGES, seed)]
    save(found, arguments.out)
    for arm in ARMS:
        print(f"{arm}: {[dict(figures(found, arm, seed)) for seed in arguments.seeds]}")


if __name__ == "__main__":
    main()
