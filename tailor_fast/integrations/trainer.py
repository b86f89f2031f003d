"""After fine-tuning with transformers' ``Trainer``, tailor the model against its base.

::

    from tailor_fast.integrations.trainer import TailorCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[TailorCallback()])
    trainer.train()  # ends with OUTPUT_DIR/tailored and OUTPUT_DIR/tailored.tailor.safetensors

Everything that can be refused is refused before the first step of training.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tailor_fast._core.errors import UsageError
from tailor_fast.calibration.lockstep import Batch
from tailor_fast.checkpoint import local_path
from tailor_fast.integrations.peft import merged_copy
from tailor_fast.integrations.saving import Destination
from tailor_fast.patching import Recipe, Report, Tailored, tailor_model
from tailor_fast.patching.inputs import Given, resolve

__all__ = ["TailorCallback"]


class TailorCallback(TrainerCallback):
    """Tailors the trained model against its base when training ends, and writes it and its patch.

    The trained model stays as it is. Three models are in memory while it is tailored: base, tuned
    and patched; for a model of which there is room for one, save it and use ``tailor-fast patch``.

    Attributes:
        result: what ``tailor_model`` returned; None before the end of training, and in processes
            other than the first.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        out: str | os.PathLike[str] | None = None,
        recipe: Recipe | None = None,
        *,
        batches: Iterable[Batch] | None = None,
        samples: int = 128,
        retain_batches: Iterable[Batch] | None = None,
        patch: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Keep what is to be done at the end of training.

        Args:
            base: directory of the base checkpoint, or its hub name in the local cache; None takes
                what the model was loaded from.
            out: directory to make; None is ``tailored`` in the trainer's ``output_dir``.
            recipe: every choice of the method; None takes the defaults.
            batches: samples of the new task as the model takes them; None takes them from the
                trainer's own training data, through its collator.
            samples: how many are taken from the training data.
            retain_batches: samples of old tasks, as for ``tailor_model``.
            patch: patch file to write; None is ``out`` with ``.tailor.safetensors`` behind it.
            overwrite: replace ``out`` and ``patch`` if they exist.

        Raises:
            UsageError: ``samples`` is not positive.
        """
        if samples < 1:
            raise UsageError(f"samples must be at least 1; got {samples}")
        self.result: Tailored | None = None
        self._base, self._out, self._patch = base, out, patch
        self._recipe = recipe or Recipe()
        self._batches = batches
        self._samples = samples
        self._retain = None if retain_batches is None else list(retain_batches)
        self._overwrite = overwrite

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002  the trainer's signature
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot work before a step is made.

        Raises:
            UsageError: the weights are spread over processes, there is no base, or the recipe asks
                for data that is not there.
            InputError, OutputError: see ``Destination.check``.
        """
        if args.fsdp or args.deepspeed:
            raise UsageError(
                "TailorCallback needs all weights in one process; got FSDP or DeepSpeed; save the"
                " model and use `tailor-fast patch`"
            )
        given = Given(samples=True, old_samples=self._retain is not None)
        resolve(self._recipe, given, Report({}))
        if state.is_world_process_zero:
            model = _plain(kwargs["model"])
            self._destination(args, model).check(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Tailor the model and write it and its patch.

        Raises:
            InputError, OutputError, StorageError, UsageError: see ``tailor_model`` and
                ``patch_checkpoint``.
        """
        if not state.is_world_process_zero:
            return
        trained = _plain(kwargs["model"])
        destination = self._destination(args, trained)
        base = type(trained).from_pretrained(
            destination.base,
            dtype="auto",
            local_files_only=True,
            # Batches without padding are read right by the attention that they were made for alone.
            attn_implementation=trained.config._attn_implementation,
        )
        nn.Module.to(base, trained.device)
        tuned = _in_dtypes_of(base, trained)
        batches = self._batches
        if batches is None:
            batches = take(kwargs["train_dataloader"], self._samples)
        self.result = tailor_model(
            base,
            tuned,
            [_moved(batch, base.device) for batch in batches],
            self._recipe,
            retain_batches=self._retain and [_moved(batch, base.device) for batch in self._retain],
        )
        with tempfile.TemporaryDirectory() as folder:
            _write_files(Path(folder), base, trained, kwargs.get("processing_class"))
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            destination.write(self.result, tuned, files)

    def _destination(self, args: TrainingArguments, model: PreTrainedModel) -> Destination:
        base = self._base or model.name_or_path
        if not base:
            raise UsageError(
                "TailorCallback: the model was not loaded from a checkpoint, so that its base is"
                " not known; give base"
            )
        path = local_path(base)
        if not path.is_dir():
            raise UsageError(
                f"{path}: base must be a directory with config.json and weights; give another"
            )
        out = Path(args.output_dir or ".") / "tailored" if self._out is None else Path(self._out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        patch = out.with_name(f"{out.name}.tailor.safetensors")
        patch = patch if self._patch is None else Path(self._patch)
        return Destination(path, out, patch, overwrite=self._overwrite)


def take(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches that hold ``samples`` samples, or all of them."""
    taken: list[Batch] = []
    count = 0
    for batch in batches:
        taken.append(batch)
        values = batch.values() if isinstance(batch, Mapping) else (batch,)
        count += next((len(v) for v in values if isinstance(v, torch.Tensor) and v.dim()), 1)
        if count >= samples:
            break
    return taken


def _plain(model: Any) -> PreTrainedModel:
    """The trained model without adapters: these are merged into a copy of their layers.

    Raises:
        UsageError: it is no model whose weights and whose base are files of transformers.
    """
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        model = merged_copy(model)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"TailorCallback needs a transformers model; got {type(model).__name__}; give both"
            " models to tailor_fast.tailor_model"
        )
    if hasattr(model, "peft_config"):
        raise UsageError(
            "TailorCallback: adapters were added by the model's own add_adapter; expected a"
            " PeftModel; wrap the model with peft.get_peft_model instead"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UsageError(
                f"TailorCallback: {name} is quantised ({parameter.dtype}); expected floats; load"
                " the model without quantisation"
            )
    return model


def _in_dtypes_of(base: PreTrainedModel, trained: PreTrainedModel) -> PreTrainedModel:
    """The trained model in the dtypes of its base; a copy only where they differ."""
    ours, theirs = base.state_dict(), trained.state_dict()
    if all(theirs[name].dtype == tensor.dtype for name, tensor in ours.items() if name in theirs):
        return trained
    tuned = copy.deepcopy(base)
    tuned.load_state_dict(theirs)
    return tuned


def _moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved_value(value, device) for key, value in batch.items()}
    return [_moved_value(value, device) for value in batch]


def _moved_value(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _write_files(
    folder: Path, base: PreTrainedModel, trained: PreTrainedModel, processor: Any
) -> None:
    """Configuration and processor as they were trained with; the dtype is that of the weights."""
    config = copy.deepcopy(trained.config)
    config.dtype, config.architectures = base.config.dtype, base.config.architectures
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
