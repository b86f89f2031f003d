"""The protocols: which model is trained on what, and fine-tuned how deep."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality import training
from benchmarks.quality.families import FAMILIES, Family
from benchmarks.quality.training import FINETUNING, Finetuning, Made, Pretraining, Report

NEW_SAMPLES = 128
OLD_SAMPLES_PER_TASK = 128


@dataclass(frozen=True)
class Protocol:
    """A base model and a way to fine-tune it.

    Attributes:
        name: used in tables and on the command line.
        title: in words.
        pretraining: the base model; its seed is replaced.
        finetuning: the new task; its seed is replaced.
    """

    name: str
    title: str
    pretraining: Pretraining
    finetuning: Finetuning

    @property
    def family(self) -> Family:
        """The kind of model."""
        return FAMILIES[self.pretraining.family]

    @property
    def old_tasks(self) -> tuple[str, ...]:
        """What the base model is trained on."""
        return self.pretraining.tasks

    def make(
        self, work: Path, pretraining_seed: int, finetuning_seed: int, report: Report
    ) -> tuple[Made, Made]:
        """Train the base and the fine-tuned model, or find them again under ``work``."""
        pretraining = replace(self.pretraining, seed=pretraining_seed)
        finetuning = replace(self.finetuning, seed=finetuning_seed)
        base = training.make_base(
            work / f"{pretraining.family}-{pretraining_seed}", pretraining, report
        )
        folder = work / f"{self.name}-{pretraining_seed}-{finetuning_seed}"
        tuned = training.make_tuned(base, folder, finetuning, report, family=self.family)
        return base, tuned


_BLIP = Pretraining(family="instructblip")
_WIDE = Pretraining(family="llava-wide")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("hard-code", "LLaVA, shifted domain", Pretraining(), FINETUNING["code"]),
        Protocol("hard-next", "LLaVA, conflicting answers", Pretraining(), FINETUNING["next"]),
        Protocol(
            "gentle-code",
            "wider LLaVA, shifted domain, low rate",
            _WIDE,
            Finetuning("code", steps=800, learning_rate=2e-4, layers=6),
        ),
        Protocol(
            "gentle-next",
            "wider LLaVA, conflicting answers, low rate",
            _WIDE,
            Finetuning("next", steps=250, learning_rate=1e-4, layers=6),
        ),
        Protocol(
            "qformer-next",
            "InstructBLIP, whole Q-Former, conflicting answers",
            _BLIP,
            Finetuning("next", steps=250, learning_rate=5e-4, layers=4),
        ),
        Protocol(
            "qformer-last-next",
            "InstructBLIP, last two Q-Former layers, conflicting answers",
            _BLIP,
            Finetuning("next", steps=250, learning_rate=5e-4, layers=2),
        ),
    )
}
