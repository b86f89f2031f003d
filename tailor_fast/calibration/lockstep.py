"""Many forward passes held at the same place: the engine that walks a model group by group.

A patched layer changes the inputs of every later layer, so statistics must be taken group by group,
with all calibration batches standing at the same group. Re-running a block once per group costs two
to three forward passes and needs a table of block types. Here each batch is a *lane*: one ordinary
forward pass, run in a greenlet, that a hook suspends where a group's input is complete. Lanes are
resumed group by group, so a stream costs one forward pass, whatever the architecture.

Only one lane runs at a time, all in the calling thread: results do not depend on scheduling.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.spill import ActivationSpill

Batch = Any  # what one forward call takes: a mapping (keywords), a sequence, or one tensor


@dataclass(frozen=True)
class Site:
    """A place where lanes stop: the first module of an input group, in call order.

    A site with ``enter`` stands before that block, whose weights may be loaded once all lanes are
    there. A site with ``behind`` stands behind that block: lanes of the rerun model stop there with
    the block's output computed, and compute it once more when they go on.
    """

    index: int
    modules: tuple[str, ...] = ()  # all modules that read the same input tensor; the first stops
    enter: str | None = None
    behind: str | None = None

    @property
    def name(self) -> str:
        """The module at which lanes stop."""
        return self.enter or self.behind or self.modules[0]


@dataclass
class Lane:
    """One forward pass of one batch, suspended at a site or finished."""

    stream: str
    batch_index: int
    batch: Batch
    run: greenlet
    position: int = -1  # index of the site where it stands
    done: bool = False
    x: torch.Tensor | None = None  # the group's input, [..., cols], while the lane stands
    last_x: weakref.ref[torch.Tensor] | None = None  # the same, not kept alive
    autocast: tuple[bool, torch.dtype] | None = None
    rerunning: bool = False


@dataclass
class Stream:
    """One model over one set of batches.

    ``first`` is the number of the first batch, where others before it run in other processes.
    """

    name: str
    model: nn.Module
    batches: Sequence[Batch]
    call: Callable[[nn.Module, Batch], object]
    first: int = 0
    lanes: list[Lane] = field(default_factory=list)


def _autocast_state(device_type: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def _restore_autocast(device_type: str, state: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled(device_type, state[0])
    torch.set_autocast_dtype(device_type, state[1])


class Lockstep:
    """Runs the lanes of several streams from site to site.

    Args:
        streams: models with their batches; two streams may share one model.
        sites: where to stop, in call order (see ``groups.discover``).
        rerun: the model whose lanes stop behind blocks too; its lanes run those blocks twice.
        spill: keeps the suspended lanes' activations under a budget; None keeps them in memory.

    Use as a context manager: the hooks and every suspended pass are gone when it exits.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        sites: Sequence[Site],
        rerun: nn.Module | None = None,
        spill: ActivationSpill | None = None,
    ) -> None:
        self._rerun = rerun
        self._spill = spill
        self._streams = {stream.name: stream for stream in streams}
        self._sites = tuple(sites)
        self._hub = getcurrent()
        self._current: Lane | None = None
        self._exit = ExitStack()
        tensors = (t for s in streams for t in (*s.model.parameters(), *s.model.buffers()))
        kinds = (tensor.device.type for tensor in tensors)
        self._device_type = next((kind for kind in kinds if kind != "meta"), "cpu")

    def __enter__(self) -> Lockstep:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            hooked: set[int] = set()
            for stream in self._streams.values():
                stack.enter_context(evaluating(stream.model))
                if id(stream.model) not in hooked:
                    hooked.add(id(stream.model))
                    stack.enter_context(self._hooks(stream.model))
                stream.lanes = [
                    self._lane(stream, number, batch)
                    for number, batch in enumerate(stream.batches, stream.first)
                ]
            stack.callback(self._abandon)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    def arrive(self, name: str, site: Site) -> Iterator[Lane]:
        """Bring the lanes of stream ``name`` to ``site`` one by one; yield those that stop there.

        A lane whose forward pass does not come through the site stays at a later one and is not
        yielded.
        """
        for lane in self._streams[name].lanes:
            while not lane.done and lane.position < site.index:
                self._resume(lane)
            if not lane.done and lane.position == site.index:
                if self._spill is not None:
                    self._spill.restore(id(lane))
                yield lane
            if self._spill is not None:
                self._spill.settle(id(lane))

    def arrive_paired(self, actual: str, target: str, site: Site) -> Iterator[tuple[Lane, Lane]]:
        """Bring the lanes of two streams to ``site``, the same batch of both side by side.

        Raises:
            InputError: a batch comes through the site in one of the two models only.
        """
        answers = self.arrive(target, site)
        for lane in self.arrive(actual, site):
            answer = next(answers, None)
            if answer is None or answer.batch_index != lane.batch_index:
                raise InputError(
                    f"{site.name}: batch {lane.batch_index} runs through it in {actual} but not in"
                    f" {target}; expected the same way through both models; use propagate 'none'"
                )
            yield lane, answer
        for answer in answers:
            raise InputError(
                f"{site.name}: batch {answer.batch_index} runs through it in {target} but not in"
                f" {actual}; expected the same way through both models; use propagate 'none'"
            )

    def gather(self, site: Site) -> None:
        """Bring the lanes of every stream to ``site``; none goes on before all are there."""
        for name in self._streams:
            for _ in self.arrive(name, site):
                pass

    def _lane(self, stream: Stream, index: int, batch: Batch) -> Lane:
        run = greenlet(lambda: stream.call(stream.model, batch), parent=self._hub)
        return Lane(stream.name, index, batch, run)

    def _resume(self, lane: Lane) -> None:
        outer = _autocast_state(self._device_type)
        if lane.autocast is not None:
            _restore_autocast(self._device_type, lane.autocast)
        self._current, lane.x = lane, None
        try:
            with nullcontext() if self._spill is None else self._spill.running(id(lane)):
                lane.run.switch()
        finally:
            self._current = None
            lane.done = lane.run.dead
            lane.autocast = _autocast_state(self._device_type)
            _restore_autocast(self._device_type, outer)

    @contextmanager
    def _hooks(self, model: nn.Module) -> Iterator[None]:
        modules = dict(model.named_modules())
        handles = []
        wrapped = []
        try:
            for site in self._sites:
                if site.behind is not None:
                    if model is self._rerun:
                        wrapped.append(modules[site.behind])
                        self._stop_behind(modules[site.behind], site)
                    continue
                if site.enter is not None:
                    # Before the hooks that load the block's weights.
                    hook = self._stop_at(site)
                    handle = modules[site.enter].register_forward_pre_hook(hook, prepend=True)
                    handles.append(handle)
                    continue
                first = modules[site.modules[0]]
                handles.append(first.register_forward_pre_hook(self._stop_at(site)))
                for name in site.modules[1:]:
                    hook = self._same_input(site, name)
                    handles.append(modules[name].register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in wrapped:
                del module.forward  # the instance attribute; the class's method is back

    def _stop_behind(self, module: nn.Module, site: Site) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            lane = self._current
            output = original(*args, **kwargs)
            if lane is None:
                return output
            del output
            lane.position = site.index
            self._hub.switch()
            lane.rerunning = True
            try:
                return original(*args, **kwargs)
            finally:
                lane.rerunning = False

        module.forward = forward

    def _stop_at(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            lane = self._current
            if lane is None or lane.rerunning:
                return
            if lane.position >= site.index:
                raise InputError(
                    f"forward pass of {lane.stream} batch {lane.batch_index}: {site.name} is"
                    " called again or out of order; expected the call order of the first batch;"
                    " exclude it with `ignore`"
                )
            lane.position = site.index
            if site.modules:
                lane.x = args[0]
                lane.last_x = weakref.ref(args[0])
            self._hub.switch()

        return hook

    def _same_input(self, site: Site, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            lane = self._current
            if lane is None or lane.position != site.index or lane.last_x is None:
                return
            if lane.last_x() is not args[0]:
                raise InputError(
                    f"forward pass of {lane.stream} batch {lane.batch_index}: {name} was expected"
                    f" to read the same input as {site.modules[0]}, as in the first batch;"
                    " exclude it with `ignore`"
                )

        return hook

    def _abandon(self) -> None:
        state = _autocast_state(self._device_type)
        for stream in self._streams.values():
            for lane in stream.lanes:
                if not lane.run.dead:
                    lane.run.throw()
            stream.lanes = []
        _restore_autocast(self._device_type, state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own mode at the end.

    Parameters want no gradient meanwhile: even where none is taken, matrix products choose another
    order of sums for one that does.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in wanting:
            parameter.requires_grad_(True)


def run_all(stream: Stream) -> Iterable[int]:
    """Run the plain forward pass of every batch; yields the batch's index after each."""
    with torch.no_grad(), evaluating(stream.model):
        for index, batch in enumerate(stream.batches):
            stream.call(stream.model, batch)
            yield index
