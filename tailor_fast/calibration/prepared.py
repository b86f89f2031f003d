"""Prepared batches: what a processor made elsewhere, as safetensors, in place of JSON lines.

Tensor ``000000.input_ids`` is input ``input_ids`` of the first batch. A file holds batches numbered
without a gap; a directory holds such files, read in the order of their names.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import (
    Checkpoint,
    StagedFile,
    TensorSpec,
    dtype_name,
    open_checkpoint,
    plan_layout,
)
from tailor_fast.models.encoding import InputBatch, ModelInfo, NamedBatch, cast
from tailor_fast.models.inputs import Tokens
from tailor_fast.models.samples import Part, part_of
from tailor_fast.models.tokens import TOKEN_MASK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDING = ".safetensors"
_NAME = re.compile(r"([0-9]{6,})\.(\w+)")
_NOT_COUNTED = -100  # the label of a token that the loss leaves out
_FORM = "expected batches as `tailor_fast.save_batches` writes them"


def save_batches(
    batches: Iterable[Mapping[str, torch.Tensor]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write batches as a file that ``calibration``, ``retain`` and ``data`` take.

    For models whose processor cannot run where they are patched. The file is complete or absent.

    Args:
        batches: keyword arguments of the model's forward pass: ``input_ids`` (integers
            ``[batch, length]``), ``attention_mask`` of the same shape, 0 at padding, and what else
            the model reads. Where only answers are to count, ``token_mask`` (True there) or
            ``labels`` (-100 elsewhere) of the same shape too.
        out: file to make, named ``*.safetensors``.
        overwrite: replace a file of that name.

    Raises:
        InputError: there is no batch, or one lacks an input or has one of another form.
        OutputError: ``out`` exists or may not be written.
        StorageError: writing failed.
        UsageError: ``out`` has another ending.
    """
    if Path(out).suffix != _ENDING:
        raise UsageError(f"{out}: expected a name that ends in {_ENDING}")
    tensors: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        _check_form(batch, f"batch {number}")
        tensors |= {f"{number:06d}.{key}": value for key, value in batch.items()}
    if not tensors:
        raise InputError("there is no batch; expected at least one")
    specs = [TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    layout = plan_layout(specs, max_shard_bytes=None)
    with StagedFile(out, layout, overwrite=overwrite) as staged:
        for name, tensor in tensors.items():
            staged.write(name, 0, tensor.detach().cpu().contiguous())
        staged.commit()


def is_tensors(path: Path) -> bool:
    """Whether ``path`` is a safetensors file or a directory, rather than JSON lines."""
    return path.suffix == _ENDING or path.is_dir()


def is_prepared(path: Path) -> bool:
    """Whether ``path`` holds prepared batches, rather than statistics or JSON lines.

    Raises:
        InputError: it is a safetensors file that cannot be read.
    """
    if path.is_dir() or not is_tensors(path):
        return path.is_dir()
    with open_checkpoint(path) as file:
        return any(map(_NAME.fullmatch, file.tensors))


@dataclass(frozen=True)
class _Place:
    """One batch: its file, its number there, its tensors by input, how many samples it has."""

    file: Checkpoint
    number: int
    names: Mapping[str, str]
    rows: int

    @property
    def where(self) -> str:
        """File and batch, as messages name them."""
        return f"{self.file.path} batch {self.number}"

    def read(self) -> InputBatch:
        return {key: self.file.read(name) for key, name in self.names.items()}


@dataclass(frozen=True)
class Prepared:
    """Batches as they were read.

    Attributes:
        batches: on the CPU, ready for the model.
        samples: how many samples all batches that are used have, other processes' too.
        found: how many there are.
        sha256: digest of all inputs that are used.
        first: number of the first batch, where other processes have those before it.
    """

    batches: list[NamedBatch]
    samples: int
    found: int
    sha256: str
    first: int


def read_prepared(
    path: Path,
    model: PreTrainedModel,
    options: RunOptions,
    dtype: torch.dtype,
    share: Callable[[int], slice] = slice,
) -> Prepared:
    """Read batches, and check that ``model`` could take them; see ``read_data``.

    Raises:
        InputError: a file is malformed, or a batch is none that the model could take.
        UsageError: answers alone are to count in an encoder-decoder.
    """
    info = ModelInfo.of(model.config)
    if options.tokens == "answer" and info.encoder_decoder:
        raise UsageError(
            "tokens 'answer' is for decoders; the model is an encoder-decoder, whose decoder reads"
            " nothing but the answer; use tokens 'all'"
        )
    digest, batches = hashlib.sha256(), []
    with ExitStack() as stack:
        places = _places(stack, path)
        found = sum(place.rows for place in places)
        places = _chosen(path, places, options.samples, options.part)
        mine = range(len(places))[share(len(places))]
        for index, place in enumerate(places):
            batch = place.read()
            _update(digest, batch)
            _check_form(batch, place.where)
            _check_model(batch, place.where, model, info, options.max_length)
            if index in mine:
                batches.append(_named(batch, place, options.tokens, dtype))
    samples = sum(place.rows for place in places)
    return Prepared(batches, samples, found, digest.hexdigest(), mine.start)


def hash_prepared(path: Path, most: int | None, part: Part = "all") -> str:
    """Return the SHA-256 (hex) of the batches that ``most`` samples leave; see ``read_prepared``.

    Raises:
        InputError: a file is malformed or cannot be read.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        for place in _chosen(path, _places(stack, path), most, part):
            _update(digest, place.read())
    return digest.hexdigest()


def _update(digest: hashlib._Hash, batch: InputBatch) -> None:
    for key in sorted(batch):
        tensor = batch[key]
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _places(stack: ExitStack, path: Path) -> list[_Place]:
    """Every batch, in order; the files stay open as long as ``stack``."""
    files = sorted(path.glob(f"*{_ENDING}")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: holds no {_ENDING} file; {_FORM}")
    return [place for file in files for place in _of(stack.enter_context(open_checkpoint(file)))]


def _of(file: Checkpoint) -> list[_Place]:
    batches: dict[int, dict[str, str]] = {}
    for name in file.tensors:
        match = _NAME.fullmatch(name)
        if match is None or f"{int(match[1]):06d}" != match[1]:
            raise InputError(f"{file.path}: tensor {name!r} is no '000000.input_ids'; {_FORM}")
        batches.setdefault(int(match[1]), {})[match[2]] = name
    for number in range(len(batches)):
        if "input_ids" not in batches.get(number, {}):
            raise InputError(f"{file.path}: has no tensor '{number:06d}.input_ids'; {_FORM}")
    if not batches:
        raise InputError(f"{file.path}: holds no batch; {_FORM}")
    return [
        _Place(file, number, names, (*file.tensors[names["input_ids"]].shape, 0)[0])
        for number, names in sorted(batches.items())
    ]


def _chosen(path: Path, places: list[_Place], most: int | None, part: Part) -> list[_Place]:
    if part == "all":
        return _thinned(places, most)
    return [places[index] for index in part_of(path, [p.rows for p in places], most, part)]


def _thinned(places: list[_Place], most: int | None) -> list[_Place]:
    """Whole batches, evenly spaced, as many as have at most ``most`` samples together."""
    found = len(places)
    if most is None:
        return places
    for count in range(min(found, most // max(1, min(p.rows for p in places))), 0, -1):
        taken = [places[index * found // count] for index in range(count)]
        if sum(place.rows for place in taken) <= most:
            return taken
    raise InputError(
        f"{places[0].where}: has {places[0].rows} samples, the limit for all batches is {most};"
        " write smaller batches or raise --samples"
    )


def _check_form(batch: Mapping[str, torch.Tensor], where: str) -> None:
    """What every model asks of its inputs."""
    odd = next((key for key, value in batch.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        got = type(batch[odd]).__name__
        raise InputError(f"{where}: {odd} is a {got}; expected tensors only; leave it out")
    for key in ("input_ids", "attention_mask"):
        if key not in batch:
            raise InputError(f"{where}: has no {key}; expected it in every batch; add it")
    shape = batch["input_ids"].shape
    for key in ("input_ids", "attention_mask", *sorted({TOKEN_MASK, "labels"} & batch.keys())):
        value = batch[key]
        if value.is_floating_point() or value.shape != shape or len(shape) != 2 or 0 in shape:
            raise InputError(
                f"{where}: {key} is {value.dtype} {list(value.shape)}; expected integers"
                " [batch, length], as many as input_ids and at least one"
            )
    for key in ("attention_mask", TOKEN_MASK):
        if key in batch and not bool(((batch[key] == 0) | (batch[key] == 1)).all()):
            raise InputError(f"{where}: {key} has other values than 0 and 1; expected no others")


def _check_model(
    batch: InputBatch, where: str, model: PreTrainedModel, info: ModelInfo, max_length: int
) -> None:
    """What this model asks of them, as far as its configuration and signature say."""
    parameters = inspect.signature(model.forward).parameters
    # By name: what a model takes as further keywords it may pass over without a word.
    for key in batch.keys() - {TOKEN_MASK, "labels"}:
        if key not in parameters:
            raise InputError(
                f"{where}: {type(model).__name__} has no input {key}; expected those of its"
                " forward pass; leave it out"
            )
    words, ids = model.config.get_text_config().vocab_size, batch["input_ids"]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= words:
        raise InputError(
            f"{where}: input_ids has {low if low < 0 else high}; expected 0 to {words - 1}, the"
            " model's vocabulary; prepare them with its own tokenizer"
        )
    longest = int(batch["attention_mask"].sum(1).max())
    if info.positions is not None and longest > info.positions:
        raise InputError(
            f"{where}: has a sample of {longest} tokens, the model has {info.positions} positions;"
            " shorten it or leave it out"
        )
    if longest > max_length:
        raise InputError(
            f"{where}: has a sample of {longest} tokens, the limit is {max_length}; shorten it,"
            " leave it out or raise --max-length"
        )


def _named(batch: InputBatch, place: _Place, tokens: Tokens, dtype: torch.dtype) -> NamedBatch:
    """The batch as the model takes it, with the mask of the tokens that count."""
    mask, labels = batch.pop(TOKEN_MASK, None), batch.pop("labels", None)
    if tokens in ("answer", "asked"):
        if mask is None and labels is not None:
            mask = labels.ne(_NOT_COUNTED)
        if mask is None and tokens == "answer":
            raise InputError(
                f"{place.where}: has neither {TOKEN_MASK} nor labels; tokens 'answer' needs one"
            )
        if mask is not None:
            batch[TOKEN_MASK] = mask.bool() & batch["attention_mask"].bool()
    elif tokens == "official":
        batch[TOKEN_MASK] = torch.ones_like(batch["attention_mask"], dtype=torch.bool)
    named = NamedBatch({key: cast(value, dtype) for key, value in batch.items()})
    named.samples = tuple(f"{place.where} row {row}" for row in range(place.rows))
    return named
