"""Small adapters, good and bad, as peft writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def save_base(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A base model without a class: names are its modules'."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """An adapter of rank 2 and alpha 4, unless ``config`` says otherwise."""
    folder.mkdir()
    named = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "the-base"}
    (folder / "adapter_config.json").write_text(json.dumps(body | config))
    return folder


def factors(
    module: str, rows: int, cols: int, rank: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """``A`` and ``B`` of one layer."""
    down, up = torch.randn(rank, cols), torch.randn(rows, rank)
    return {f"{module}.lora_A.weight": down.to(dtype), f"{module}.lora_B.weight": up.to(dtype)}
