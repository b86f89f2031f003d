"""Makers of small files, good and bad, shared by the tests of this folder."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import Layout, TensorSpec, plan_layout

U8_PAIR = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def raw_file(header: bytes | str | Mapping[str, object], data: bytes = b"") -> bytes:
    """A safetensors file of any header, legal or not."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def some_tensors() -> dict[str, torch.Tensor]:
    """A few tensors: matrix, vector, scalar, empty, odd bytes."""
    return {
        "layer.weight": torch.randn(6, 5).bfloat16(),
        "layer.bias": torch.randn(5),
        "scale": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "odd": torch.arange(7, dtype=torch.uint8),
    }


def save_sharded(directory: Path, shards: Mapping[str, dict[str, torch.Tensor]]) -> Path:
    """Write shards and their index, as a model hub has them."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file_name, tensors in shards.items():
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: object, **more: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map} | more)
    (directory / "model.safetensors.index.json").write_text(text)


def layout_of(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int | None = None) -> Layout:
    """Layout of tensors whose dtypes are float32, bfloat16 or uint8."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
    specs = [TensorSpec(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    return plan_layout(specs, max_shard_bytes=max_shard_bytes)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def run_python(
    code: str, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; its output is text."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
        cwd=cwd,
    )
