"""An open patch file: what it changes, its parts block by block, on and off a model in memory."""

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from torch import nn

from tailor_fast.checkpoint import Checkpoint, open_checkpoint
from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.ops.codec import EncodedPatch
from tailor_fast.patchfile.layout import LIMITS, PatchEntry, PatchPlan
from tailor_fast.patchfile.modules import ModuleSwitch
from tailor_fast.patchfile.parsing import read_plan
from tailor_fast.patchfile.parts import StoredParts
from tailor_fast.patchfile.states import APPLY, REVERT


class Patch(Mapping[str, PatchEntry]):
    """An open patch file; a mapping from the names of the tensors that it changes to their entries.

    ::

        with tailor_fast.Patch.open("task.tailor.safetensors") as patch:
            patch.apply_(model)   # the model's tensors become TARGET's, bit for bit
            patch.remove_(model)  # and BASE's again

    Attributes:
        path: as given.
        plan: every tensor of the two checkpoints, the unchanged ones too, with digests.
    """

    def __init__(self, file: Checkpoint) -> None:
        """Take over an open file; see ``open``."""
        self.path: Path = file.path
        self.plan: PatchPlan = read_plan(file)
        self._file = file
        self._places = {entry.name: at for at, entry in self.plan.stored}
        self._switch = ModuleSwitch(self.path, self.plan, self.parts)

    @classmethod
    def open(cls, path: AnyPath) -> Self:
        """Open a patch file; reads its header only.

        Raises:
            NotPatchError: a safetensors file of another kind, or another version of the format.
            MalformedError, TruncatedError: the file is damaged.
            MissingFileError: it is not there, or not readable.
        """
        file = open_checkpoint(path, limits=LIMITS)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    def __getitem__(self, name: str) -> PatchEntry:
        """Return the entry of a tensor that the patch changes; ``KeyError`` for any other."""
        return self.plan.entries[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors that the patch changes, sorted."""
        return iter(self._places)

    def __len__(self) -> int:
        """Number of tensors that the patch changes."""
        return len(self._places)

    def parts(self, name: str) -> StoredParts:
        """Read the stored parts of a tensor that the patch changes range by range."""
        return StoredParts(self._file, self._places[name], self[name])

    def encoded(self, name: str) -> EncodedPatch:
        """Read what is stored of one tensor, for ``tailor_fast.ops.codec.apply_patch_``.

        Returns:
            Mask, XOR words and block counts on the CPU; not checked against each other.

        Raises:
            KeyError: the patch does not change such a tensor.
            MalformedError: the block counts do not fit the plan.
            TruncatedError, TransferError: the file cannot be read.
        """
        return self.parts(name).encoded(0, self[name].words)

    def apply_(self, module: nn.Module) -> bool:
        """Turn the tensors of ``module`` from BASE's into TARGET's, in place and bit for bit.

        Every tensor is checked before the first one is changed: its digest must be BASE's, and the
        stored parts must turn it into TARGET's. Names are those of the module's state dict; those
        of a transformers model are mapped by transformers' own rules. Tensors that share memory are
        changed once; tensors that the module does not have may be missing if the patch leaves them.

        Args:
            module: its tensors, on any device, in the dtype of the checkpoint.

        Returns:
            True when the module was changed; False when it was TARGET already.

        Raises:
            WrongStateError: a tensor is neither BASE's nor TARGET's, or some are one and some the
                other. Nothing was changed.
            MismatchError: a tensor is missing, of another shape or dtype, or not contiguous.
            MalformedError, TruncatedError: the patch file is damaged. Nothing was changed.
            ChangedError: the patch file was changed since it was opened. Nothing was changed.
            TransferError: the file cannot be read; what was changed is changed back.
        """
        self.check_unchanged()
        return self._switch.run(module, APPLY)

    def remove_(self, module: nn.Module) -> bool:
        """Turn the tensors of ``module`` from TARGET's into BASE's: ``apply_`` the other way round.

        Returns:
            True when the module was changed; False when it was BASE already.

        Raises:
            TailorError: as for ``apply_``.
        """
        self.check_unchanged()
        return self._switch.run(module, REVERT)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._file.shards[0].snapshot.size

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Where the file lives: an output must not touch it."""
        return self._file.input_paths

    def check_unchanged(self) -> None:
        """Raise ``ChangedError`` when the file was changed since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file; safe to repeat."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Close; an exception on its way is not replaced by one about a changed file."""
        self._file.__exit__(kind, error, trace)

    def __repr__(self) -> str:
        """Path and counts."""
        return (
            f"Patch({str(self.path)!r}, {len(self)} of {len(self.plan.entries)} tensors,"
            f" {self.plan.changed} of {self.plan.words} words)"
        )
