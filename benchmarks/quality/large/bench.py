"""The larger pair of models with its data: asked and tailored on its device, merged on the CPU."""

from collections.abc import Mapping

import torch

from benchmarks.quality.baselines import State
from benchmarks.quality.bench import PROMPTS, Bench
from benchmarks.quality.evaluation import TEST_SEED, VALIDATION_SEED, Scores, tuned_linears
from benchmarks.quality.large import scenes
from benchmarks.quality.large.model import encode
from benchmarks.quality.large.training import LargeProtocol
from benchmarks.quality.protocols import NEW_SAMPLES, OLD_SAMPLES_PER_TASK
from benchmarks.quality.scenes import Split
from benchmarks.quality.tinyllava import Batch
from benchmarks.quality.training import Made
from tailor_fast import Recipe

_SEEDS: dict[Split, int] = {"validation": VALIDATION_SEED, "test": TEST_SEED}


class LargeBench(Bench):
    """A ``Bench`` whose models are on a device; states and what rules read of data are on the CPU.

    Args:
        protocol: how the pair was trained.
        base: the base checkpoint.
        tuned: the fine-tuned one.
        seed: of the calibration scenes, which are training scenes.
    """

    def __init__(self, protocol: LargeProtocol, base: Made, tuned: Made, seed: int) -> None:
        self.family, self._device = protocol.family, protocol.device
        self.new_task, self.old_tasks = protocol.finetuning.task, protocol.old_tasks
        loaded = [self.family.load(made.folder) for made in (base, tuned, base)]
        # Taken before the models move: `Module.to` leaves these tensors where they are.
        self.states = (loaded[0].state_dict(), loaded[1].state_dict())
        self.names = tuned_linears(loaded[0], loaded[1])
        self.base, self.tuned, self._scratch = (model.to(self._device) for model in loaded)
        self.new_batch = self._encoded(self.new_task, "train", NEW_SAMPLES, seed)
        self.old_batches = [
            self._encoded(task, "train", OLD_SAMPLES_PER_TASK, seed) for task in self.old_tasks
        ]
        self._questions = {}

    def input_norms(self) -> Mapping[str, torch.Tensor]:
        """As ``Bench.input_norms``, on the CPU."""
        return _on_cpu(super().input_norms())

    def fisher(self) -> Mapping[str, torch.Tensor]:
        """As ``Bench.fisher``, on the CPU."""
        return _on_cpu(super().fisher())

    def tailor(self, recipe: Recipe, *, retain: bool) -> State:
        """Return the state of the model that ``tailor_model`` makes on the device, on the CPU."""
        return _on_cpu(super().tailor(recipe, retain=retain))

    def scores(self, state: State, split: Split) -> Scores:
        """Ask every task's questions of one split."""
        if split not in self._questions:
            self._questions[split] = {
                task: self._encoded(task, split, PROMPTS[split], _SEEDS[split])
                for task in (*self.old_tasks, self.new_task)
            }
        return super().scores(state, split)

    def _encoded(self, task: str, split: Split, count: int, seed: int) -> Batch:
        return encode([scenes.draw(task, split, count, seed)], self._device)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
