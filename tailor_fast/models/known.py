"""Decoders whose tree of modules is known from the names on disk, without building the model.

Importing transformers and a model class takes longer than patching a small checkpoint without data.
These classes all have one tree and store it under its own names; a checkpoint that holds any other
name is left to ``build_skeleton``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tailor_fast._core.regular_file import read_regular
from tailor_fast.models.linears import Target

_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_BLOCK = "|".join(
    (
        rf"(?:{'|'.join(map(re.escape, _LINEARS))})\.(?:weight|bias)",
        r"self_attn\.[qk]_norm\.weight",
        r"(?:input|post_attention)_layernorm\.weight",
    )
)
_IN_BLOCK = re.compile(rf"model\.layers\.(0|[1-9]\d*)\.(?:{_BLOCK})", re.ASCII)
_OUTSIDE = frozenset(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))


def known_targets(directory: Path, names: Iterable[str]) -> list[Target] | None:
    """List the patchable layers of a model as ``find_targets`` would of its skeleton.

    Args:
        directory: holds ``config.json``.
        names: tensors of the checkpoint; for these classes they are the names of parameters.

    Returns:
        Layers in module order, of which some may have no tensor; None when the model is not known
        well enough.
    """
    try:
        config = json.loads(read_regular(directory / "config.json"))
        kinds, blocks = config["architectures"], config["num_hidden_layers"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # building the skeleton says what is wrong
    if kinds not in [[kind] for kind in _CLASSES] or type(blocks) is not int:
        return None
    if config.get("quantization_config") is not None or not _all_known(names, blocks):
        return None
    return [
        Target(f"model.layers.{number}.{linear}", transposed=False)
        for number in range(blocks)
        for linear in _LINEARS
    ]


def _all_known(names: Iterable[str], blocks: int) -> bool:
    for name in names:
        block = _IN_BLOCK.fullmatch(name)
        if name not in _OUTSIDE and (block is None or int(block[1]) >= blocks):
            return False
    return True
