"""A model that was patched in memory, as files: in the form of its base checkpoint, and the patch.

Tensors keep the names, dtypes and distribution that they have in the base checkpoint, whatever the
model calls them in memory, so that the patch file fits the base and nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint import (
    Checkpoint,
    CheckpointRecord,
    Hashed,
    Layout,
    OutputExistsError,
    StagedCheckpoint,
    TensorHasher,
    checkpoint_root,
    input_record,
    open_checkpoint,
    plan_layout,
)
from tailor_fast.models import map_keys, refuse_fused, split_experts
from tailor_fast.patchfile import diff_checkpoints
from tailor_fast.patchfile.diffing import check_name
from tailor_fast.patching import Tailored
from tailor_fast.patching.picture import draw_report
from tailor_fast.patching.records import add_records
from tailor_fast.patching.sources import BLOCK_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 5 * 10**9


class Destination:
    """Where a tailored model and its patch will be, checked before the work begins.

    Args:
        base: directory of the base checkpoint.
        out: directory to make, in an existing one.
        patch: patch file to write.
        overwrite: replace what is there, when the new one is complete.
    """

    def __init__(self, base: Path, out: Path, patch: Path, *, overwrite: bool) -> None:
        self.base, self.out, self.patch = base, out, patch
        self._overwrite = overwrite

    def check(self, model: PreTrainedModel) -> None:
        """Check that a model like this one can be written; reads headers, writes nothing.

        Raises:
            InputError: the base checkpoint does not hold this model.
            OutputError: ``out`` or ``patch`` exists or cannot be made.
            UsageError: the name of ``patch`` is not that of a patch file.
        """
        check_name(self.patch)
        if self.patch.exists() and not self._overwrite:
            remedy = "choose another place, or overwrite it (overwrite=True)"
            raise OutputExistsError("exists already", path=self.patch, remedy=remedy)
        with open_checkpoint(self.base) as base:
            with split_experts(model):
                self._keys(base, model)
            layout, inputs = _layout(base), base.input_paths
        StagedCheckpoint.check(self.out, layout, overwrite=self._overwrite, inputs=inputs)

    def write(self, result: Tailored, tuned: nn.Module, files: Iterable[Path]) -> None:
        """Write the model, then the patch that turns the base into it and back.

        Args:
            result: what to write; of the base checkpoint's class and dtypes.
            tuned: the model that it was made from, for its digests.
            files: configuration, tokenizer and the like; those of the base fill up the rest.

        Raises:
            InputError, OutputError, StorageError: as for ``patch_checkpoint``.
        """
        model: PreTrainedModel = result.model  # type: ignore[assignment]  # checked by `check`
        with open_checkpoint(self.base) as base, split_experts(model, tuned):
            state = self._keys(base, model)
            for row in result.report.linears:
                row.tensor = state[f"{row.name}.weight"]
            with StagedCheckpoint(
                self.out, _layout(base), overwrite=self._overwrite, inputs=base.input_paths
            ) as staged:
                source = Hashed(base)
                words = _by_disk_name(model.state_dict(), state)
                for name in (n for shard in staged.layout.shards for n in shard.tensors):
                    tensor = words[name] if name in words else source.read(name)
                    staged.write(name, 0, tensor.detach().cpu().contiguous())
                tuned_words = _by_disk_name(tuned.state_dict(), state)
                report = result.report
                add_records(
                    staged,
                    report,
                    draw_report(report.to_dict()),
                    recipe=report.recipe,
                    places={"base": self.base},
                    inputs={
                        "base": input_record(base, source.finish(bytearray(BLOCK_BYTES))),
                        "tuned": _record(base, tuned_words),
                    },
                    side_files={p.name: p for p in (*base.side_files, *files)}.values(),
                    licensed=base,
                )
                staged.commit()
        diff_checkpoints(self.base, self.out, self.patch, overwrite=self._overwrite)

    def _keys(self, base: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
        """State-dict name -> name on disk, for every tensor of the model that has one."""
        remedy = "save the tuned model and use `tailor-fast patch`, or name the right base"
        keys = map_keys(model, base.tensors, str(self.base))
        refuse_fused(model, keys, str(self.base))
        for name, tensor in model.named_parameters(remove_duplicate=False):
            info = base.tensors.get(keys.get(name, ""))
            if info is None or tuple(tensor.shape) != info.shape:
                found = "nothing" if info is None else f"{list(info.shape)}"
                raise InputError(
                    f"{self.base}: has {found} for {name} {list(tensor.shape)}; expected the base"
                    f" of the model that is trained; {remedy}"
                )
        return keys


def _layout(base: Checkpoint) -> Layout:
    return plan_layout(base.tensors.values(), max_shard_bytes=SHARD_BYTES)


def _by_disk_name(
    state: Mapping[str, torch.Tensor], keys: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    return {keys[name]: tensor for name, tensor in state.items() if name in keys}


def _record(base: Checkpoint, tuned: Mapping[str, torch.Tensor]) -> CheckpointRecord:
    """The digests of a model in memory, which has no files."""
    digests = {}
    for name, tensor in tuned.items():
        info = base.tensors[name]
        hasher = TensorHasher(info.dtype, info.shape)
        hasher.update(tensor.detach().cpu().contiguous())
        digests[name] = hasher.hexdigest()
    return CheckpointRecord({}, digests, checkpoint_root(digests))
