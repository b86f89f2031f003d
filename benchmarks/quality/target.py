"""``python -m benchmarks.quality.target``: ``target_old`` on trained pairs, on their test scenes.

For each pair: the defaults, and what is found for each target, with density searched and with the
default density; all fitted on the same training scenes. What was measured is kept in the output and
not measured again, as long as the checkpoints are the same.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quality import scenes, tinyllava
from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import read
from benchmarks.quality.commands import command_line
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.training import Report
from benchmarks.results import ROOT, machine
from tailor_fast import Recipe, RunOptions, patch_checkpoint, save_batches
from tailor_fast._core.errors import InputError
from tailor_fast.patching.report import Report as Done

OUT = ROOT / "results" / "quality" / "target.csv"
NAMES = ("hard-code", "hard-next", "qformer-next")
TARGETS = (0.95, 0.99)
DENSITY = 0.1
NEW_SCENES, OLD_SCENES = 384, 180  # of the new task, and of each old one
_ROWS = 16
COLUMNS = (
    "protocol", "finetuning_seed", "samples", "target", "asked_density", "made",
    "density", "retain_weight", "held_old", "held_old_error", "held_new", "models_tried",
    "old_kept", "new_kept", "old_mean", "new", "seconds", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One line.

    Attributes:
        samples: at most so many are fitted on, of each file.
        target: share to keep of old tasks; None runs the defaults.
        density: share of the weights; None searches.
    """

    samples: int
    target: float | None
    density: float | None

    def columns(self) -> dict[str, str]:
        """Return what tells the line from others of its pair."""
        return {
            "samples": str(self.samples),
            "target": "" if self.target is None else f"{self.target:g}",
            "asked_density": "" if self.density is None else f"{self.density:g}",
        }


def asked(samples: Sequence[int]) -> Iterator[Asked]:
    """Yield the lines of a pair."""
    for count in samples:
        yield Asked(count, None, DENSITY)
        for target in TARGETS:
            yield Asked(count, target, DENSITY)
            yield Asked(count, target, None)


class Pair:
    """A trained pair, with its scenes as prepared batches: InstructBLIP's has no processor here.

    Args:
        name: of the protocol.
        seed: of the fine-tuned model and of the scenes.
        work: folder of the checkpoints.
        scratch: folder for scenes and models.
        report: called with a line of progress at a time.
    """

    def __init__(self, name: str, seed: int, work: Path, scratch: Path, report: Report) -> None:
        protocol = PROTOCOLS[name]
        self.base, self.tuned = protocol.make(work, 0, seed, report)
        self.bench = Bench(protocol, self.base, self.tuned, seed)
        self._scratch = scratch
        self.new, self.old = scratch / "new.safetensors", scratch / "old.safetensors"
        self._save([self.bench.new_task], NEW_SCENES, seed, self.new)
        self._save(self.bench.old_tasks, OLD_SCENES, seed, self.old)
        self.ends = [self.bench.scores(state, "test") for state in self.bench.states]

    def measure(self, line: Asked) -> dict[str, str]:
        """Make the model of a line and measure it; a target that nothing keeps has no model."""
        out, began = self._scratch / "out", time.perf_counter()
        recipe = Recipe() if line.density is None else Recipe(density=line.density)
        options = RunOptions(samples=line.samples, resume="never", overwrite=True)
        if line.target is None:
            options = replace(options, part="fitted")
        try:
            done = patch_checkpoint(
                self.base.folder, self.tuned.folder, out, recipe,
                calibration=self.new, retain=self.old, target_old=line.target, options=options,
            )  # fmt: skip
        except InputError as error:
            return {"density": f"none: {error}"}
        seconds = time.perf_counter() - began
        scores = self.bench.scores(self.bench.family.load(out).state_dict(), "test")
        return {**_found(done), **self._kept(scores), "seconds": f"{seconds:.1f}"}

    def _kept(self, scores: Scores) -> dict[str, str]:
        base, tuned = self.ends
        return {
            "old_kept": f"{scores.old_mean / base.old_mean:.4f}",
            "new_kept": f"{scores.new / tuned.new:.4f}",
            "old_mean": f"{scores.old_mean:.2f}",
            "new": f"{scores.new:.2f}",
        }

    def _save(self, tasks: Sequence[str], count: int, seed: int, path: Path) -> None:
        parts = [self._batches(task, count, seed) for task in tasks]
        save_batches([batch for turn in zip(*parts, strict=True) for batch in turn], path)

    def _batches(self, task: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        whole = tinyllava.encode([scenes.draw(task, "train", count, seed)])
        ids = torch.cat([whole.input_ids, whole.answer_ids], dim=1)
        prompt = torch.zeros_like(whole.input_ids)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_mask": torch.cat([prompt, torch.ones_like(whole.answer_ids)], dim=1),
            "pixel_values": whole.pixel_values,
            **self.bench.family.extra(whole.input_ids),
        }
        cut = {name: value.split(_ROWS) for name, value in inputs.items()}
        return [
            {name: parts[index] for name, parts in cut.items()}
            for index in range(len(cut["input_ids"]))
        ]


def _found(done: Done) -> dict[str, str]:
    found = done.target_old
    if found is None:
        return {"density": f"{done.recipe['density']:g}"}
    best = found.chosen
    return {
        "density": f"{best.point.density:g}",
        "retain_weight": f"{best.point.retain_weight:g}",
        "held_old": f"{best.old:.4f}",
        "held_old_error": f"{best.old_error:.4f}",
        "held_new": f"{best.new:.4f}",
        "models_tried": str(len(found.tried)),
    }


def run(
    work: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    samples: Sequence[int],
    known: Sequence[dict[str, str]],
    report: Report = print,
) -> Iterator[dict[str, str]]:
    """Yield every line, measuring what ``known`` lacks."""
    for name in names:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                pair = Pair(name, seed, work, Path(folder), report)
                for line in asked(samples):
                    key = {
                        "protocol": name,
                        "finetuning_seed": str(seed),
                        "made": pair.tuned.fingerprint[:12],
                        **line.columns(),
                    }
                    earlier = (row for row in known if key.items() <= row.items())
                    row = next(earlier, None)
                    if row is None:
                        row = {**key, **pair.measure(line), "commit": machine()["commit"]}
                    report(", ".join(f"{k} {v}" for k, v in row.items() if v))
                    yield row


def save(rows: Sequence[dict[str, str]], path: Path, command: str) -> None:
    """Write the lines below a remark that names what made them."""
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {command}; {facts}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Parse the command line, run, write the lines as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.target")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, nargs="+", default=[128])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = list(read(arguments.out)) if arguments.out.exists() else []
    command = command_line("benchmarks.quality.target")
    rows: list[dict[str, str]] = []
    which = (arguments.protocols, arguments.seeds, arguments.samples)
    for row in run(arguments.work, *which, known):
        rows.append(row)
        save([*rows, *(row for row in known if row not in rows)], arguments.out, command)


if __name__ == "__main__":
    main()
