"""A patch on a model in memory: every tensor checked, then every tensor changed, or none."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tailor_fast._core.checks import describe
from tailor_fast._core.errors import TailorError
from tailor_fast.checkpoint import MismatchError, TensorHasher, TransferError, torch_dtype
from tailor_fast.checkpoint.errors import listed, quoted
from tailor_fast.checkpoint.signals import signals_held
from tailor_fast.models import map_keys, split_experts
from tailor_fast.ops.codec.layout import BLOCK
from tailor_fast.patchfile.layout import PatchEntry, PatchPlan
from tailor_fast.patchfile.parts import StoredParts
from tailor_fast.patchfile.states import Direction, must_change, wrong_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RANGE = 32 * BLOCK  # words that are hashed or changed at a time


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor of a module and its entry in the plan."""

    entry: PatchEntry
    tensor: torch.Tensor

    def ranges(self) -> Iterable[tuple[int, torch.Tensor]]:
        """First word and words, flat, of one range after the other."""
        flat = self.tensor.view(-1)
        return ((begin, flat[begin : begin + _RANGE]) for begin in range(0, len(flat), _RANGE))


class ModuleSwitch:
    """Applies one patch file to modules and takes it off again.

    Args:
        path: of the file, for messages.
        plan: of the file.
        parts: reads the stored parts of a tensor.
    """

    def __init__(self, path: Path, plan: PatchPlan, parts: Callable[[str], StoredParts]) -> None:
        self._path = path
        self._plan = plan
        self._parts = parts
        # Tensors whose parts were seen to turn BASE into TARGET, which stays so as long as the file
        # is open: the next switch need not compute it again.
        self._proven: set[str] = set()

    def run(self, module: nn.Module, direction: Direction) -> bool:
        """See ``Patch.apply_``."""
        held = _distinct(_find(module, self._plan))
        with torch.no_grad():
            found = {one.entry: self._digests(one) for one in held}
            if not must_change(((e, now) for e, (now, _) in found.items()), direction, None):
                return False
            for entry, (now, then) in found.items():
                self._prove(entry, now, then)
            self._change([one for one in held if one.entry.changed])
        return True

    def _digests(self, one: _Held) -> tuple[str, str | None]:
        """Digest of the tensor as it is, and as the patch would make it; None: known already."""
        entry = one.entry
        unproven = entry.changed and entry.name not in self._proven
        now, then = (TensorHasher(entry.dtype, entry.shape, self._plan.digest) for _ in range(2))
        parts = self._parts(entry.name) if unproven else None
        for begin, words in one.ranges():
            now.update(words.cpu())
            if parts is not None:
                changed = words.clone()
                parts.xor_(changed, begin)
                then.update(changed.cpu())
        return now.hexdigest(), then.hexdigest() if unproven else None

    def _prove(self, entry: PatchEntry, now: str, then: str | None) -> None:
        """Check that the parts turn BASE into TARGET, or TARGET into BASE, which is the same."""
        if then is None:
            return
        expected = entry.target if now == entry.base else entry.base
        if then != expected:
            raise wrong_result(self._path, entry.name, expected, then)
        self._proven.add(entry.name)

    def _change(self, held: list[_Held]) -> None:
        done: list[tuple[StoredParts, torch.Tensor, int]] = []
        try:
            for one in held:
                parts = self._parts(one.entry.name)
                for begin, words in one.ranges():
                    with signals_held():  # what is changed is known to be changed
                        parts.xor_(words, begin)
                        done.append((parts, words, begin))
        except BaseException:
            with signals_held():
                self._change_back(done)
            raise

    def _change_back(self, done: list[tuple[StoredParts, torch.Tensor, int]]) -> None:
        try:
            for parts, words, begin in reversed(done):
                parts.xor_(words, begin)
        except TailorError as error:
            problem = f"could not be read again to undo what was begun ({error})"
            remedy = "the module is half changed: load it again"
            raise TransferError(problem, path=self._path, remedy=remedy) from error


def _find(module: nn.Module, plan: PatchPlan) -> list[_Held]:
    """The module's tensors by the plan's names, which are those on disk."""
    tensors = _by_disk_name(module, [entry.name for entry in plan.entries])
    missing = [e.name for e in plan.entries if e.changed and e.name not in tensors]
    kind = type(module).__name__
    if missing:
        problem = f"{kind} has none of {len(missing)} tensors that the patch changes"
        remedy = "give a model of the architecture that the patch was made from"
        raise MismatchError(f"{problem}: {listed(missing)}", remedy=remedy)
    held = [_Held(e, tensors[e.name]) for e in plan.entries if e.name in tensors]
    for one in held:
        _check_form(one, kind)
    return held


def _by_disk_name(module: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    state = _tensors(module)
    if not _is_pretrained(module):
        return {name: state[name] for name in names if name in state}
    with split_experts(module):  # whose weights are views: what changes them changes the module
        state |= _tensors(module)
        keys = map_keys(cast("PreTrainedModel", module), names, type(module).__name__)
    return {name: state[key] for key, name in keys.items() if key in state}


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def _is_pretrained(module: nn.Module) -> bool:
    """Whether transformers knows how the module's names map to those on disk.

    Asked by name, so that a model without transformers does not import it.
    """
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


def _check_form(one: _Held, kind: str) -> None:
    entry, tensor = one.entry, one.tensor
    dtype = torch_dtype(entry.dtype)
    fits = tensor.dtype == dtype and tuple(tensor.shape) == entry.shape
    if fits and tensor.is_contiguous() and tensor.device.type != "meta":
        return
    problem = f"must be {entry.dtype} {list(entry.shape)}, contiguous and in memory"
    strides = "" if tensor.is_contiguous() else f", strides {tensor.stride()}"
    remedy = "load the model in the dtype of its checkpoint"
    raise MismatchError(
        f"{problem}; got {describe(tensor)}{strides} in {kind}", tensor=entry.name, remedy=remedy
    )


def _distinct(held: list[_Held]) -> list[_Held]:
    """Leave one of the tensors that share all their memory; refuse those that share a part."""
    spans = sorted(
        (str(one.tensor.device), one.tensor.data_ptr(), one.tensor.nbytes, at)
        for at, one in enumerate(held)
        if one.tensor.nbytes
    )
    shared = set[int]()
    for before, after in pairwise(spans):
        if before[0] != after[0] or before[1] + before[2] <= after[1]:
            continue
        first, second = held[before[3]].entry, held[after[3]].entry
        same = (first.dtype, first.base, first.target) == (second.dtype, second.base, second.target)
        if before[1:3] != after[1:3] or not same:
            problem = f"shares memory with {quoted(first.name)}, but the patch changes them apart"
            raise MismatchError(problem, tensor=second.name, remedy="untie them in the model")
        shared.add(before[3])
    return [one for at, one in enumerate(held) if at not in shared]
