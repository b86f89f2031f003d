"""Blocks on their way to a GPU: the next one is read from disk while the present one is solved.

Reading a block, hashing it and merging an adapter into it take the host about as long as statistics
and solve take the GPU, and the same words are asked for up to three times: by the models that run
and by the solve. A thread for each checkpoint reads them once, into page-locked memory, from which
they are copied at the speed of the bus and while the host goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from tailor_fast._core.machine import memory
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.streamed import skeleton_of
from tailor_fast.checkpoint import Hashed, shown_size
from tailor_fast.checkpoint.files import byte_view
from tailor_fast.models import blocks_of
from tailor_fast.patching.inputs import Given
from tailor_fast.patching.memory import FIXED_BYTES
from tailor_fast.patching.pipeline import PIECE_BYTES, Worker
from tailor_fast.patching.plan import PatchPlan, host_bytes
from tailor_fast.patching.sources import Sources
from tailor_fast.patching.streamed import StreamedWeights

Groups = Sequence[Sequence[str]]


class Ahead(Hashed):
    """A checkpoint of which one group of tensors is in memory and the next is being read.

    For one thread. Tensors that ``read`` gives are its own, and must not be written to.

    Args:
        source: what is read; nothing else reads tensors of the groups meanwhile.
        groups: names in the order in which they will be asked for; another order costs reading.
        locked: whether the memory is page-locked.
    """

    def __init__(self, source: Hashed, groups: Groups, *, locked: bool) -> None:
        super().__init__(
            source.checkpoint, base=source._base, shared=source._shared, digests=source.digests
        )
        self._groups = groups
        self._place = {name: at for at, names in enumerate(groups) for name in names}
        self._locked = locked
        self._worker = Worker("ahead")
        self._reads: dict[str, Future[torch.Tensor]] = {}
        self._at: int | None = None

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name``, and begin to read what comes next.

        Raises:
            TruncatedError, TransferError: it cannot be read.
        """
        if name not in self._place:
            return super().read(name)
        self._move(self._place[name])
        return self._reads[name].result()

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """``Hashed.read_into``, from memory where the tensor is of a group."""
        if name not in self._place:
            return super().read_into(name, buffer, begin, end)
        words = byte_view(self.read(name), writable=False)[begin:end]
        byte_view(buffer, writable=True)[: len(words)] = words
        return len(words)

    def close(self) -> None:
        """Stop reading, and give all memory back."""
        self._worker.close()
        self._reads.clear()

    def _move(self, group: int) -> None:
        if group == self._at:
            return
        self._at = group
        wanted = [name for names in self._groups[group : group + 2] for name in names]
        for name in self._reads.keys() - set(wanted):
            self._reads.pop(name).cancel()
        for name in wanted:
            if name not in self._reads:
                self._reads[name] = self._worker.submit(partial(self._fetch, name))

    def _fetch(self, name: str) -> torch.Tensor:
        """Read a tensor, in the worker's thread."""
        tensor = self.checkpoint.empty(name)
        if self._locked:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        words = byte_view(tensor, writable=True)
        for at, end in self._worker.pieces(0, len(words), PIECE_BYTES):
            super().read_into(name, words[at:], at, end)
        return tensor


def plan_ahead(sources: Sources, plan: PatchPlan, given: Given, options: RunOptions) -> PatchPlan:
    """Let blocks be read ahead where they go to a GPU and the machine's memory has room for two.

    Args:
        sources: the open pair.
        plan: of the run.
        given: the data at hand.
        options: of the run; ``max_ram`` counts where it is less than half of the free memory.
    """
    device = torch.device(options.device)
    if device.type == "cpu":
        return plan
    size = sum(_locked_bytes(*side) for side in _sides(sources, given))
    room = memory()[0] // 2
    if options.max_ram is not None:
        room = min(room, options.max_ram)
    taken = host_bytes(plan, device) + FIXED_BYTES
    if taken + size <= room:
        return replace(plan, ahead=size)
    told = (
        f"blocks are read when they are needed, not ahead: that takes {shown_size(size)} beside"
        f" {shown_size(taken)}, of {shown_size(room)} (`max_ram`, or half of the free memory)"
    )
    return replace(plan, notes=(*plan.notes, told))


@contextmanager
def reading_ahead(weights: StreamedWeights, plan: PatchPlan, given: Given) -> Iterator[None]:
    """Let ``weights`` take what it reads from threads that read ahead, if the plan has room."""
    before = weights.sources
    if not plan.ahead:
        yield
        return
    locked = weights.device.type == "cuda"
    base, tuned = (Ahead(*side, locked=locked) for side in _sides(before, given))
    weights.sources = replace(before, base=base, tuned=tuned)
    try:
        yield
    finally:
        weights.sources = before
        base.close()
        tuned.close()


def _sides(sources: Sources, given: Given) -> tuple[tuple[Hashed, Groups], tuple[Hashed, Groups]]:
    """What is read of BASE and of TUNED, in order."""
    layers = [
        [name for name in (layer.tensor, layer.bias) if name is not None]
        for layer in sources.layers
    ]
    if not given.samples:
        return (sources.base, layers), (sources.tuned, layers)
    blocks = _blocks(sources)
    solved = {name for names in layers for name in names}
    known = sources.base.checkpoint.tensors
    of_base = [
        [name for name in names if name in (known if given.old_samples else solved)]
        for names in blocks
    ]
    return (sources.base, of_base), (sources.tuned, blocks)


def _blocks(sources: Sources) -> Groups:
    """Names on disk of each block's parameters."""
    model, known = skeleton_of(sources.tuned), sources.tuned.checkpoint.tensors
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    blocks = dict[str, dict[str, None]]()  # each name once, in order
    for name, block in blocks_of(model, names).items():
        if block is not None and sources.keys.get(name) in known:
            blocks.setdefault(block, {})[sources.keys[name]] = None
    return [list(names) for names in blocks.values()]


def _locked_bytes(source: Hashed, groups: Groups) -> int:
    """Most that is held at once: two groups, each tensor in a power of two of page-locked bytes."""
    sizes: Mapping[str, int] = {
        name: 1 << max(0, source.checkpoint.tensors[name].nbytes - 1).bit_length()
        for names in groups
        for name in names
    }
    each = [sum(sizes[name] for name in names) for names in groups]
    return max((one + two for one, two in zip(each, [*each[1:], 0], strict=True)), default=0)
