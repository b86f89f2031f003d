"""The algorithm ``model_tailor`` for fusion_bench.

    fusion_bench 'hydra.searchpath=[pkg://tailor_fast.integrations.fusion_bench_config]' \
        method=model_tailor modelpool=...

The pool's pretrained model is the base, its one other model the tuned one; the train dataset of
that name gives the samples. Without it, the largest changes are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from tailor_fast._core.errors import UsageError
from tailor_fast.integrations.extras import need
from tailor_fast.integrations.tensorwise import recipe_from
from tailor_fast.patching import Report, tailor_model

_fusion_bench = need("fusion_bench", "fusion-bench")
_Algorithm: Any = _fusion_bench.BaseAlgorithm

__all__ = ["ModelTailorAlgorithm"]


@_fusion_bench.auto_register_config
class ModelTailorAlgorithm(_Algorithm):  # type: ignore[misc]  # fusion_bench is optional
    """Tailors the one tuned model of a pool against its pretrained model.

    Attributes:
        report: what was done; None before ``run``.
    """

    def __init__(
        self,
        samples: int = 128,
        batch_size: int = 8,
        retain_datasets: Sequence[str] = (),  # noqa: ARG002  the decorator keeps it
        model_save_path: str | None = None,  # noqa: ARG002
        recipe: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the configuration.

        Args:
            samples: how many are taken from each train dataset.
            batch_size: how many run at once.
            retain_datasets: train datasets of old tasks.
            model_save_path: where ``run`` saves the model; None does not.
            recipe: fields of ``tailor_fast.Recipe``; None takes the defaults.
            **kwargs: for fusion_bench.
        """
        super().__init__(**kwargs)
        self.report: Report | None = None
        self._recipe = recipe_from(dict(recipe or {}), "method.recipe")
        if samples < 1 or batch_size < 1:
            raise UsageError(
                f"method: samples and batch_size must be at least 1; got {samples} and {batch_size}"
            )

    def run(self, modelpool: Any) -> nn.Module:
        """Return the tailored model.

        Raises:
            InputError: the two models do not match, or activations are not finite.
            UsageError: the pool does not hold a pretrained and one other model, as modules; or the
                recipe asks for data that is not there.
        """
        if not modelpool.has_pretrained or len(modelpool.model_names) != 1:
            names = ", ".join(modelpool.all_model_names)
            raise UsageError(
                f"the pool has the models {names}; expected _pretrained_ and one other; leave the"
                " rest out"
            )
        (name,) = modelpool.model_names
        base, tuned = modelpool.load_pretrained_model(), modelpool.load_model(name)
        for model in (base, tuned):
            if not isinstance(model, nn.Module):
                raise UsageError(
                    f"the pool loads a {type(model).__name__}; expected a module; set"
                    " modelpool.enable_lazy_loading=false, or use `tailor-fast patch`, which reads"
                    " models piece by piece"
                )
        has_data = name in modelpool.train_dataset_names
        new = list(self._batches(modelpool, name)) if has_data else None
        old = [b for task in self.retain_datasets for b in self._batches(modelpool, task)]
        result = tailor_model(base, tuned, new, self._recipe, retain_batches=old or None)
        self.report = result.report
        if self.model_save_path is not None:
            modelpool.save_model(result.model, self.model_save_path, algorithm_config=self.config)
        return result.model

    def _batches(self, modelpool: Any, task: str) -> Iterator[dict[str, torch.Tensor]]:
        """The first samples of a train dataset, which must be the model's arguments, stacked."""
        from transformers import default_data_collator

        if task not in modelpool.train_dataset_names:
            known = ", ".join(modelpool.train_dataset_names) or "none"
            raise UsageError(f"the pool has no train dataset {task!r}; expected one of: {known}")
        samples = iter(islice(modelpool.load_train_dataset(task), self.samples))
        while batch := list(islice(samples, self.batch_size)):
            collated = default_data_collator([dict(sample) for sample in batch])
            yield {key: value for key, value in collated.items() if key != "labels"}
