"""``make demo``: a model that forgets, repaired by tailor_fast, beside the published baselines.

``python -m benchmarks.demo --work demo-out`` makes a base and a fine-tuned LLaVA from real images
(or finds them again), runs ``tailor-fast patch`` on the two folders as a user would, loads what it
wrote with ``from_pretrained``, lets every model answer the same test prompts and prints one table.
The rows stand in ``results.csv`` and ``results.json`` too.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.quality import baselines, evaluation, table, tinyllava, training
from benchmarks.quality.baselines import State
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.scenes import NEW_TASKS, Split
from benchmarks.quality.table import Row

VALIDATION_PROMPTS = 200  # of each task, for every choice
DARE_SEEDS = range(5)


class Demo:
    """One run: the pair of models, the weights that a patch may change, and the rows so far."""

    def __init__(self, work: Path, setting: training.Setting, density: float, prompts: int) -> None:
        self.work = work
        self.setting = setting
        self.density = density
        self.prompts = prompts
        self.rows: list[Row] = []
        self._began = time.perf_counter()
        self.pair = training.make_pair(work, setting, self.say)
        self.base = tinyllava.load(self.pair.base.folder)
        self.tuned = tinyllava.load(self.pair.tuned.folder)
        self.targets = evaluation.tuned_linears(self.base, self.tuned)

    def say(self, line: str) -> None:
        """Print one line of progress."""
        print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", flush=True)

    def run(self) -> None:
        """Measure every model of the table."""
        self.add("base", self.base, self.pair.base.seconds)
        self.add("fine-tuned", self.tuned, self.pair.tuned.seconds)
        share = f"{100 * self.density:g}%"
        base, tuned = self.base.state_dict(), self.tuned.state_dict()
        sparse = (base, tuned, self.targets, self.density)
        self.row({f"magnitude {share}": self._merge(baselines.magnitude, *sparse)})
        self.row(
            {f"DARE {share}, seed {s}": self._merge(baselines.dare, *sparse, s) for s in DARE_SEEDS}
        )
        self.row(
            {
                f"WiSE-FT {a:g}, dense": self._merge(baselines.wise_ft, base, tuned, a)
                for a in baselines.WISE_FT_GRID
            }
        )
        # The paper's own mode: the score of the authors' code, the sweep of Optimal Brain Surgeon.
        paper = ("--sensitivity", "weight", "--decorate", "obs", "--propagate", "none")
        self.row({f"Model Tailor {share}, OBS": partial(self.tailor, "tailored-obs", *paper)})
        retain = ("--retain", str(self.pair.old_data))  # its weight is measured
        ours = {f"tailor_fast {share}": partial(self.tailor, "tailored", *retain)}
        best = self.row(ours, ours=True)
        self.verify(Path(best.name_or_path))

    def tailor(self, folder: str, *options: str) -> Any:
        """Run ``tailor-fast patch`` into ``folder`` and load what it wrote."""
        out = self.work / folder
        arguments = [
            *("patch", str(self.pair.base.folder), str(self.pair.tuned.folder), "-o", str(out)),
            *("--calibration", str(self.pair.new_data), "--density", str(self.density)),
            *(*options, "--batch-size", "64", "--overwrite"),
        ]
        self._command(*arguments)
        return tinyllava.load(out)

    def verify(self, out: Path) -> None:
        """Prove what was written, and that it answers PNG files through its own processor."""
        print(self._command("verify", str(out)).rstrip())
        print(f"report     {out / 'tailor_report.json'}")
        print(f"picture    {out / 'tailor_report.png'}", flush=True)
        answers = evaluation.check_processor(out, self._tasks())
        self.say(f"{len(answers)} PNG files through AutoProcessor: the same answers")

    def _command(self, *arguments: str) -> str:
        """Run the console script on one thread, as all of the demo; returns what it printed."""
        self.say(f"$ OMP_NUM_THREADS=1 tailor-fast {' '.join(arguments)}")
        program = Path(sys.executable).with_name("tailor-fast")
        done = subprocess.run(
            [program, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise SystemExit(f"tailor-fast ended with {done.returncode}: {said}")
        return done.stdout

    def row(self, candidates: Mapping[str, Callable[[], Any]], *, ours: bool = False) -> Any:
        """Make every candidate, add the one with the best H-mean on validation scenes, return it.

        A single candidate is no choice and is not asked.
        """

        def made(name: str) -> tuple[float, str, Any, float]:
            began = time.perf_counter()
            model = candidates[name]()
            seconds = time.perf_counter() - began
            if len(candidates) == 1:
                return 0.0, name, model, seconds
            quality = self._scores(model, "validation", VALIDATION_PROMPTS).h_mean
            return quality, name, model, seconds

        _, name, model, seconds = max(map(made, candidates), key=itemgetter(0))
        self.add(name, model, seconds, ours=ours)
        return model

    def add(self, name: str, model: Any, seconds: float, *, ours: bool = False) -> None:
        """Measure a model on the test prompts and keep its row."""
        base, state = self.base.state_dict(), model.state_dict()
        row = Row(
            name=name,
            scores=self._scores(model, "test", self.prompts),
            changed=evaluation.changed_share(base, state, self.targets),
            changed_all=evaluation.changed_share(base, state, list(base)),
            seconds=seconds,
            ours=ours,
        )
        self.rows.append(row)
        self.say(f"{name}: old {row.scores.old_mean:.1f}%, new {row.scores.new:.1f}%")

    def _merge(self, rule: Callable[..., State], *arguments: Any) -> Callable[[], Any]:
        def make() -> Any:
            model = copy.deepcopy(self.base)
            model.load_state_dict(rule(*arguments))
            return model

        return make

    def _tasks(self) -> list[str]:
        return [*self.setting.pretraining.tasks, self.setting.finetuning.task]

    def _scores(self, model: Any, split: Split, count: int) -> Scores:
        *old, new = self._tasks()
        return evaluation.evaluate(model, new, old_tasks=old, split=split, count=count)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]; got {text}")
    return value


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Make a model that forgets, repair it, compare it with the baselines.",
    )
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="output folder")
    parser.add_argument("--task", choices=NEW_TASKS, default="code", help="the new task")
    parser.add_argument("--density", type=_share, default=0.1, help="share of weights to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tuning")
    parser.add_argument("--prompts", type=int, default=500, help="test prompts of each task")
    arguments = parser.parse_args()
    # For models this small a second thread gains little, and on busy cores costs tenfold.
    torch.set_num_threads(1)
    finetuning = replace(training.FINETUNING[arguments.task], seed=arguments.seed)
    setting = replace(training.DEMO, finetuning=finetuning)
    demo = Demo(arguments.work, setting, arguments.density, arguments.prompts)
    demo.run()
    table.save(demo.rows, demo.work)
    demo.say(f"results.csv and results.json are in {demo.work}")
    console = Console()
    console.print()
    table.show(demo.rows, f"Accuracy in percent; new task: {arguments.task}", console)


if __name__ == "__main__":
    main()
