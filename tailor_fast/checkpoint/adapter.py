"""TUNED may be a PEFT LoRA adapter: which tensors of BASE it changes, and how.

Every tensor of the adapter must find its place; what cannot be merged exactly is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

from tailor_fast.checkpoint.adapter_config import (
    MERGE,
    AdapterConfig,
    read_adapter_config,
)
from tailor_fast.checkpoint.adapter_view import (
    AdapterView,
    Change,
    Changes,
    LowRank,
    Shift,
    Whole,
    merged_info,
)
from tailor_fast.checkpoint.errors import (
    AnyPath,
    MalformedError,
    MismatchError,
    MissingFileError,
    NotSafetensorsError,
    listed,
    quoted,
    shown_path,
)
from tailor_fast.checkpoint.hub import local_path
from tailor_fast.checkpoint.index import ADAPTER_CONFIG, INDEX_NAME, SINGLE_NAME
from tailor_fast.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from tailor_fast.checkpoint.source import TensorSource

ADAPTER_NAME = "adapter_model.safetensors"
REST_NAME = "non_lora_trainables.safetensors"
# (BASE's directory, its tensor names, other names) -> the other names as BASE has them; names that
# it does not know are left out. Only what knows model classes can tell.
Renamed = Callable[[Path, Iterable[str], Iterable[str]], Mapping[str, str]]

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<what>weight|bias))?"
)
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_MERGEABLE = ("F32", "F16", "BF16")
_SAVE_AGAIN = "save the adapter again with peft"

V = TypeVar("V")
Parts = dict[str, dict[str, str]]  # module -> part, such as lora_A, -> name in the file


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is the directory of a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def open_tuned(path: AnyPath, base: Checkpoint, renamed: Renamed) -> TensorSource:
    """Open TUNED: a checkpoint, or an adapter of ``base``, whose merged words are then read.

    Args:
        path: as for ``open_checkpoint``, or an adapter's directory.
        base: the model that the adapter was trained on; it must stay open.
        renamed: asked where names of the adapter are not those of ``base``'s files.

    Raises:
        CheckpointError: as for ``open_checkpoint``; or an adapter that cannot be merged exactly or
            does not fit ``base``.
    """
    path = local_path(path)
    if not is_adapter(path):
        return open_checkpoint(path)
    present = [name for name in (SINGLE_NAME, INDEX_NAME) if (path / name).exists()]
    if present:
        problem = f"holds {present[0]} and {ADAPTER_CONFIG}: is it a model or an adapter?"
        remedy = "give the model's file itself, or move the adapter to a directory of its own"
        raise MalformedError(problem, path=path, remedy=remedy)
    config = read_adapter_config(path)
    with ExitStack() as stack:
        files = adapter_files(path)
        adapter, *others = (stack.enter_context(open_checkpoint(file)) for file in files)
        changes = _Reader(base, config, adapter, tuple(others), renamed).changes()
        stack.pop_all()
        return AdapterView(path, base, changes)


def adapter_files(directory: Path) -> tuple[Path, ...]:
    """The weight files of an adapter: its own, then those of whole tensors beside it.

    Raises:
        MissingFileError: it has none.
        NotSafetensorsError: they are pickles.
    """
    return (_weights(directory), *_rest(directory))


def _weights(directory: Path) -> Path:
    path = directory / ADAPTER_NAME
    pickle = directory / "adapter_model.bin"
    if not path.exists() and pickle.exists():
        problem = "is a pickle, which may run code when loaded"
        remedy = f"{_SAVE_AGAIN} (save_pretrained, safe_serialization=True)"
        raise NotSafetensorsError(problem, path=pickle, remedy=remedy)
    if not path.exists():
        problem = f"holds {ADAPTER_CONFIG} without {ADAPTER_NAME}"
        raise MissingFileError(problem, path=directory, remedy="fetch the missing file")
    return path


def _rest(directory: Path) -> tuple[Path, ...]:
    """LLaVA's trainer puts what it trained beside the adapter, its projector, into another file."""
    path, pickle = directory / REST_NAME, directory / "non_lora_trainables.bin"
    if path.exists():
        return (path,)
    if pickle.exists():
        problem = "is a pickle, which may run code when loaded"
        remedy = f"convert it to {REST_NAME}, under the same tensor names"
        raise NotSafetensorsError(problem, path=pickle, remedy=remedy)
    return ()


class _Reader:
    """Finds the place of every tensor of an adapter."""

    def __init__(
        self,
        base: Checkpoint,
        config: AdapterConfig,
        adapter: Checkpoint,
        others: tuple[Checkpoint, ...],
        renamed: Renamed,
    ) -> None:
        self._base = base
        self._config = config
        self._adapter = adapter
        self._others = others
        self._renamed = renamed
        self._made: dict[str, Change] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._orientation: dict[str, bool] = {}
        self._starts: dict[str, Whole] = {}  # peft saves wrapped embeddings beside their factors

    def changes(self) -> Changes:
        """Look at every name; raises what ``open_tuned`` raises."""
        parts, whole = self._sorted()
        for module in parts:
            start = whole.get(f"{module}.weight")
            if start is not None and ".base_layer." in start.name:
                self._starts[module] = whole.pop(f"{module}.weight")
        names = self._in_base(parts, whole)
        lost = [module for module in parts if f"{module}.weight" not in names]
        if lost:
            problem = f"changes {len(lost)} layers that {shown_path(self._base.path)} lacks"
            named = self._config.base_model
            trained = "" if named is None else f"; it was trained on {quoted(named)}"
            remedy = "give the model that it was trained on as BASE"
            raise MismatchError(
                f"{problem}: {listed(lost)}{trained}", path=self._adapter.path, remedy=remedy
            )
        self._check_orientation(parts, names)
        for module, found in parts.items():
            self._add_module(module, found, names)
        for name, source in whole.items():
            self._add_whole(names.get(name, name), source)
        return Changes(self._adapter, self._others, self._made, self._tensors)

    def _sorted(self) -> tuple[Parts, dict[str, Whole]]:
        """Names in the files as factors by module, and as whole tensors by name."""
        parts: Parts = {}
        whole: dict[str, Whole] = {}
        for source in (self._adapter, *self._others):
            for stored in source.tensors:
                name = stored.removeprefix(_PREFIX)
                factor = _FACTOR.fullmatch(name)
                if factor is not None and source is self._adapter:
                    ending = ".bias" if factor["what"] == "bias" else ""
                    found = parts.setdefault(_WRAPPED.sub("", factor["module"]), {})
                    self._put(found, factor["part"] + ending, stored, stored)
                elif "lora_" in name or ".token_adapter." in name:
                    self._refuse(stored, "is no part of a LoRA that is known here")
                else:
                    self._put(whole, _WRAPPED.sub("", name), Whole(source, stored), stored)
        return parts, whole

    def _put(self, places: dict[str, V], key: str, value: V, stored: str) -> None:
        if key in places:
            self._refuse(stored, "means the same as another of its tensors", _SAVE_AGAIN)
        places[key] = value

    def _in_base(self, parts: Parts, whole: Mapping[str, Whole]) -> dict[str, str]:
        """Names of the adapter that BASE has -> BASE's own."""
        wanted = [f"{module}.weight" for module in parts]
        wanted += [f"{module}.bias" for module, found in parts.items() if "lora_B.bias" in found]
        wanted += whole
        names = {name: name for name in wanted if name in self._base.tensors}
        unknown = [name for name in wanted if name not in names]
        if unknown and self._base.directory is not None:
            names |= self._renamed(self._base.directory, self._base.tensors, unknown)
        return names

    def _check_orientation(self, parts: Parts, names: Mapping[str, str]) -> None:
        """Layers stored the other way round are told by shape; a square one by the configuration.

        peft writes one flag for all layers, that of the last: worthless when they differ.
        """
        told = {
            module: self._swapped(found, names[f"{module}.weight"], module)
            for module, found in parts.items()
        }
        flag = self._config.transposed
        contrary = [module for module, swapped in told.items() if swapped is (not flag)]
        square = [module for module, swapped in told.items() if swapped is None]
        if contrary and square:
            problem = (
                f"fan_in_fan_out is {str(flag).lower()}, which is wrong for {quoted(contrary[0])};"
                f" whether it holds for {quoted(square[0])}, which is square, cannot be told"
            )
            raise MalformedError(problem, path=self._config.path, remedy=MERGE)
        self._orientation = {
            module: flag if swapped is None else swapped for module, swapped in told.items()
        }

    def _swapped(self, found: dict[str, str], name: str, module: str) -> bool | None:
        """Whether a weight is stored ``[in, out]``; None when its shape does not tell."""
        embedding = "lora_embedding_A" in found
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        allowed = {*ends} | (set() if embedding else {"lora_B.bias", "lora_magnitude_vector"})
        if not {*ends} <= found.keys() <= allowed:
            first = next(iter(found.values()))
            got = listed(sorted(found))
            self._refuse(first, f"the factors of {quoted(module)} must be A and B; got {got}")
        down, up = (self._adapter.tensors[found[end]] for end in ends)
        start = self._starts.get(module)
        info = self._base.tensors[name] if start is None else start.source.tensors[start.name]
        rank = self._config.rank_of(module)
        if any(len(shape) != 2 for shape in (down.shape, up.shape, info.shape)):
            self._refuse(down.name, f"changes {info.dtype} {list(info.shape)}, no matrix")
        if down.shape[0] != rank or up.shape[1] != rank:
            problem = f"rank must be {rank}, as {ADAPTER_CONFIG} says; got {_shapes(down, up)}"
            self._refuse(down.name, problem, _SAVE_AGAIN)
        if info.dtype not in _MERGEABLE:
            remedy = "give the base model in bf16, fp16 or fp32"
            self._refuse(down.name, f"changes a tensor of dtype {info.dtype}", remedy)
        product = up.shape[0], down.shape[1]
        if info.shape not in (product, product[::-1]):
            problem = f"{_shapes(down, up)} must fit {list(info.shape)} of {quoted(name)} in BASE"
            self._refuse(down.name, problem, "give the model that it was trained on as BASE")
        if embedding:  # stored [entries, width], its product [width, entries]
            return True
        return None if product[0] == product[1] else info.shape != product

    def _add_module(self, module: str, found: dict[str, str], names: Mapping[str, str]) -> None:
        scale, swapped = self._config.scale_of(module), self._orientation[module]
        weight = names[f"{module}.weight"]
        magnitude = found.get("lora_magnitude_vector")
        embedding = "lora_embedding_A" in found
        if self._config.dora and (magnitude is None or swapped):
            problem = f"is a DoRA of {quoted(module)}, whose lengths are not those of stored rows"
            self._refuse(next(iter(found.values())), problem)
        if magnitude is not None:
            rows = self._base.tensors[weight].shape[0]
            lengths = self._adapter.tensors[magnitude]
            if not self._config.dora or lengths.numel != rows:
                problem = f"must be {rows} lengths of a DoRA; got {list(lengths.shape)}"
                self._refuse(magnitude, problem, _SAVE_AGAIN)
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        down, up = (found[end] for end in ends)
        start = self._starts.get(module)
        if start is not None:
            self._check_replaced(start, self._base.tensors[weight])
        name = None if start is None else start.name
        self._change(weight, LowRank(down, up, scale, swapped, magnitude, name), down)
        if "lora_B.bias" in found:
            self._add_bias(f"{module}.bias", found["lora_B.bias"], scale, names)

    def _add_bias(self, bias: str, step: str, scale: float, names: Mapping[str, str]) -> None:
        info = self._base.tensors.get(names.get(bias, ""))
        if info is None or info.shape != self._adapter.tensors[step].shape:
            what = "which BASE lacks" if info is None else f"{list(info.shape)} in BASE"
            self._refuse(step, f"changes {quoted(bias)}, {what}")
        if info.dtype not in _MERGEABLE:
            self._refuse(step, f"changes a bias of dtype {info.dtype}")
        self._change(info.name, Shift(step, scale), step)

    def _add_whole(self, name: str, whole: Whole) -> None:
        info, own = self._base.tensors.get(name), whole.source.tensors[whole.name]
        if info is None:
            self._tensors[name] = replace(own, name=name)
            self._change(name, whole, whole.name)
            return
        self._check_replaced(whole, info)
        self._change(name, whole, whole.name)

    def _check_replaced(self, whole: Whole, info: TensorInfo) -> None:
        own, name = whole.source.tensors[whole.name], info.name
        if own.dtype != info.dtype and not {own.dtype, info.dtype} <= set(_MERGEABLE):
            self._refuse(whole.name, f"is {own.dtype} and replaces {info.dtype} of {quoted(name)}")
        if own.shape != info.shape and not (self._config.path.parent / "config.json").is_file():
            problem = f"is {list(own.shape)} and replaces {list(info.shape)} of {quoted(name)}"
            remedy = "put the config.json of the resized model beside the adapter"
            self._refuse(whole.name, problem, remedy)
        if own.shape != info.shape:
            self._tensors[name] = merged_info(info, own.shape)

    def _change(self, name: str, change: Change, stored: str) -> None:
        self._put(self._made, name, change, stored)

    def _refuse(self, stored: str, problem: str, remedy: str = MERGE) -> NoReturn:
        held = next((s for s in self._others if stored in s.tensors), self._adapter)
        raise MismatchError(problem, path=held.path, tensor=stored, remedy=remedy)


def _shapes(down: TensorInfo, up: TensorInfo) -> str:
    return f"A {list(down.shape)} and B {list(up.shape)}"
