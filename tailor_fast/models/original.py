"""LLaVA-1.5 as its authors store it, a layout that transformers cannot run."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Classes of the authors' own code, which config.json names.
ORIGINAL_CLASSES = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
_MARK = "model.mm_projector."
# Their module names -> those of transformers' class, first match only.
_RENAMED = (
    (r"model\.mm_projector\.0", "model.multi_modal_projector.linear_1"),
    (r"model\.mm_projector\.2", "model.multi_modal_projector.linear_2"),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"model\.layers\.", "model.language_model.layers."),
)


def is_original(names: Iterable[str]) -> bool:
    """Whether tensors with these names are a LLaVA in its authors' layout."""
    return any(name.startswith(_MARK) for name in names)


def transformers_name(module: str) -> str:
    """Turn a module's name in the authors' layout into that of transformers' class."""
    for pattern, name in _RENAMED:
        found = re.match(pattern, module)
        if found:
            return name + module[found.end() :]
    return module
