"""Pairs of checkpoints and their patches, small and quickly made."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tailor_fast.checkpoint import dtype_name, open_checkpoint
from tailor_fast.checkpoint.files import byte_view
from tests.ops.codec.words import random_pair

Tensors = dict[str, torch.Tensor]
# name -> shape, dtype, share of the words that differ
FORMS: dict[str, tuple[tuple[int, ...], torch.dtype, float]] = {
    "layers.0.weight": ((40, 33), torch.bfloat16, 0.1),
    "layers.1.weight": ((300, 257), torch.bfloat16, 0.3),  # more than one block of counts
    "bias": ((77,), torch.float32, 1.0),
    "eight.weight": ((9, 13), torch.float8_e4m3fn, 0.5),
    "steps": ((3,), torch.int64, 1.0),
    "flags": ((11,), torch.bool, 0.5),
    "scale": ((), torch.float32, 1.0),
    "empty": ((0, 4), torch.bfloat16, 0.0),
    "same": ((21,), torch.float16, 0.0),
}


def pair() -> tuple[Tensors, Tensors]:
    """Base and target of ``FORMS``; always the same."""
    torch.manual_seed(11)
    both = {name: random_pair(*form) for name, form in FORMS.items()}
    return {n: b for n, (b, _) in both.items()}, {n: t for n, (_, t) in both.items()}


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write one file as any writer might: no padding, tensors in the order given."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(byte_view(tensor.contiguous(), writable=False))
        offsets = [len(data), len(data) + len(raw)]
        form = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        header[name] = {**form, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Write ``base`` and ``target`` of ``pair`` as model directories with side files."""
    paths = folder / "base", folder / "target"
    for path, tensors in zip(paths, pair(), strict=True):
        save(path / "model.safetensors", tensors)
        (path / "config.json").write_text(json.dumps({"made": path.name}))
        (path / "README.md").write_text(path.name)
    return paths


def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    found = {}
    with open_checkpoint(path) as file:
        for name, info in file.tensors.items():
            raw = bytearray(info.nbytes)
            file.read_into(name, raw)
            found[name] = info.dtype, info.shape, bytes(raw)
    return found


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden names too."""
    return sorted(path.name for path in folder.iterdir())
