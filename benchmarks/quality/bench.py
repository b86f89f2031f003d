"""One pair of models with its data: what a method may look at, and how its result is measured."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.quality import scenes, sensitivities, tinyllava
from benchmarks.quality.baselines import State
from benchmarks.quality.evaluation import (
    TEST_SEED,
    VALIDATION_SEED,
    Scores,
    changed_share,
    tuned_linears,
)
from benchmarks.quality.families import Family, Inputs
from benchmarks.quality.memory import with_peak
from benchmarks.quality.protocols import NEW_SAMPLES, OLD_SAMPLES_PER_TASK, Protocol
from benchmarks.quality.scenes import Split
from benchmarks.quality.tinyllava import Batch
from benchmarks.quality.training import Made
from tailor_fast import Recipe, tailor_model
from tailor_fast.ops.codec import encode_patch

PROMPTS: dict[Split, int] = {"validation": 300, "test": 500}
_SEEDS: dict[Split, int] = {"validation": VALIDATION_SEED, "test": TEST_SEED}


@dataclass(frozen=True)
class Result:
    """A method's model as it is measured.

    Attributes:
        scores: accuracies.
        changed: share of the targeted weights that differ from the base model.
        patch_bytes: size of everything that differs, as a patch: bit masks and XOR words.
        cpu_seconds: processor time of making it, all threads.
        peak_bytes: memory that making it took beyond what was there before; -1 where the system
            does not say.
    """

    scores: Scores
    changed: float
    patch_bytes: int
    cpu_seconds: float
    peak_bytes: int


class Bench:
    """A base and a fine-tuned model, calibration scenes, and the questions of both splits.

    Args:
        protocol: how the pair was trained.
        base: the base checkpoint.
        tuned: the fine-tuned one.
        seed: of the calibration scenes, which are training scenes.
    """

    def __init__(self, protocol: Protocol, base: Made, tuned: Made, seed: int) -> None:
        self.family = protocol.family
        self.new_task = protocol.finetuning.task
        self.old_tasks = protocol.old_tasks
        self.base = self.family.load(base.folder)
        self.tuned = self.family.load(tuned.folder)
        self._scratch = self.family.load(base.folder)
        self.states: tuple[State, State] = (self.base.state_dict(), self.tuned.state_dict())
        self.names = tuned_linears(self.base, self.tuned)
        self.new_batch = _encoded(self.new_task, "train", NEW_SAMPLES, seed)
        self.old_batches = [
            _encoded(task, "train", OLD_SAMPLES_PER_TASK, seed) for task in self.old_tasks
        ]
        self._questions: dict[Split, dict[str, Batch]] = {}

    def input_norms(self) -> Mapping[str, torch.Tensor]:
        """Norms of the fine-tuned model's input columns on the new task, by weight."""
        return sensitivities.input_norms(self.tuned, self.family, self.new_batch, self.names)

    def fisher(self) -> Mapping[str, torch.Tensor]:
        """Empirical Fisher diagonal of the fine-tuned model on the new task, by weight."""
        return sensitivities.fisher(self.tuned, self.family, self.new_batch, self.names)

    @property
    def new_inputs(self) -> list[Inputs]:
        """Calibration batches of the new task."""
        return [self.family.inputs(self.new_batch)]

    @property
    def old_inputs(self) -> list[Inputs]:
        """Calibration batches of the old tasks."""
        return [labelled(self.family, batch) for batch in self.old_batches]

    def tailor(self, recipe: Recipe, *, retain: bool) -> State:
        """Return the state of the model that ``tailor_model`` makes."""
        old = self.old_inputs if retain else None
        done = tailor_model(self.base, self.tuned, self.new_inputs, recipe, retain_batches=old)
        return done.model.state_dict()

    def scores(self, state: State, split: Split) -> Scores:
        """Ask every task's questions of one split."""
        if split not in self._questions:
            self._questions[split] = {
                task: _encoded(task, split, PROMPTS[split], _SEEDS[split])
                for task in (*self.old_tasks, self.new_task)
            }
        self._scratch.load_state_dict(state)
        right = {
            task: 100.0 * self.family.right(self._scratch, batch).double().mean().item()
            for task, batch in self._questions[split].items()
        }
        new = right.pop(self.new_task)
        return Scores(right, new)

    def measure(self, make: Callable[[], State], split: Split) -> Result:
        """Make a model and measure it."""
        began = time.process_time()
        state, peak = with_peak(make)
        seconds = time.process_time() - began
        base = self.states[0]
        return Result(
            self.scores(state, split),
            changed_share(base, state, self.names),
            sum(_patch_bytes(base[name], state[name]) for name in base),
            seconds,
            peak,
        )


def labelled(family: Family, batch: Batch) -> Inputs:
    """A batch as the model takes it, with ``labels``: -100 but where the answer stands."""
    inputs = family.inputs(batch)
    labels = inputs["input_ids"].clone()
    labels[:, : batch.input_ids.shape[1]] = -100
    return {**inputs, "labels": labels}


def _encoded(task: str, split: Split, count: int, seed: int) -> Batch:
    return tinyllava.encode([scenes.draw(task, split, count, seed)])


def _patch_bytes(base: torch.Tensor, other: torch.Tensor) -> int:
    if torch.equal(base, other):
        return 0
    patch = encode_patch(base.contiguous(), other.contiguous())
    return sum(part.numel() * part.element_size() for part in patch)
