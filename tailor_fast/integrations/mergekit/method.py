"""What ``model_tailor`` computes for one tensor, whatever the version of mergekit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailor_fast.integrations.tensorwise import TensorwisePatch, recipe_from
from tailor_fast.patching import Recipe

NAME = "model_tailor"
PRETTY_NAME = "Model Tailor"
REFERENCE = "https://arxiv.org/abs/2402.12048"
FILES = ("statistics", "retain")
# What stands under ``parameters`` in a configuration of mergekit: files, and fields of ``Recipe``
# but the one on tensors that one model lacks, which mergekit never hands to a method.
PARAMETERS = (*FILES, *(name for name in Recipe.model_fields if name != "missing"))


@dataclass
class Settings:
    """What holds where a configuration says nothing, and the pairs that are open.

    Attributes:
        defaults: values of ``PARAMETERS``; the only way to give text to mergekit 0.1.4, whose
            configurations hold numbers alone.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    _jobs: dict[tuple[object, ...], TensorwisePatch] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def merge(
        self,
        name: str,
        pair: tuple[torch.Tensor, torch.Tensor],
        folders: tuple[Path, Path],
        parameters: Mapping[str, Any],
    ) -> torch.Tensor:
        """Return the patched tensor.

        Args:
            name: of the tensor.
            pair: its values in base and tuned model.
            folders: where their checkpoints are.
            parameters: from the configuration, by name; None where it says nothing.

        Raises:
            TailorError: see ``TensorwisePatch`` and ``recipe_from``.
        """
        given = {key: value for key, value in parameters.items() if value is not None}
        values = {**self.defaults, **given}
        density = values.get("density")
        if isinstance(values.get("layers"), int | float):
            values["layers"] = f"{values['layers']:g}"  # YAML takes 3 for a number
        job = self._job(values, folders)
        return job.patch(name, *pair, density=density)

    def close(self) -> None:
        """Close every file."""
        for job in self._jobs.values():
            job.close()
        self._jobs.clear()

    @property
    def kept(self) -> tuple[int, int]:
        """Weights that were kept, and weights of the layers that were patched."""
        reports = [job.report for job in self._jobs.values()]
        return sum(r.kept for r in reports), sum(r.targeted for r in reports)

    def _job(self, values: Mapping[str, Any], folders: tuple[Path, Path]) -> TensorwisePatch:
        where = "merge_method model_tailor, parameters"
        recipe = recipe_from({k: v for k, v in values.items() if k not in FILES}, where)
        # Density may differ from tensor to tensor; all of them share what is open.
        shared = tuple(sorted((k, v) for k, v in values.items() if k != "density"))
        with self._lock:
            key = (folders, shared)
            if key not in self._jobs:
                files = {k: Path(values[k]) for k in FILES if values.get(k)}
                self._jobs[key] = TensorwisePatch(*folders, recipe, **files)
            return self._jobs[key]
