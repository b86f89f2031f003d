"""Decoders that are known without being built have the layers that the built model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tailor_fast.models import build_skeleton, find_targets, known_targets, map_keys

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,  # two digits: the order is that of the numbers
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def save(folder: Path, kind: str, **more: Any) -> list[str]:
    """Write the configuration of a model of class ``kind``; returns its names on disk."""
    config_class = getattr(transformers, kind).config_class
    config = config_class(**SIZES, **more, architectures=[kind])
    config.save_pretrained(folder)
    model = build_skeleton(folder)
    return [name for name in model.state_dict() if not (more and name == "lm_head.weight")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_known_layers_are_those_of_the_model(kind: str, tied: bool, tmp_path: Path) -> None:
    names = save(tmp_path, kind, **({"tie_word_embeddings": True} if tied else {}))
    model = build_skeleton(tmp_path)
    assert known_targets(tmp_path, names) == find_targets(model)
    keys = map_keys(model, names, "x")
    assert all(keys[name] == name for name in names)


def test_biases_are_known(tmp_path: Path) -> None:
    names = save(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    assert any(name.endswith("o_proj.bias") for name in names)
    assert known_targets(tmp_path, names) == find_targets(build_skeleton(tmp_path))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.12.mlp.up_proj.weight",  # one block more than the configuration has
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight.absmax",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "language_model.model.norm.weight",
        "vision_tower.weight",
    ],
)
def test_a_checkpoint_with_other_names_is_left_to_the_model(extra: str, tmp_path: Path) -> None:
    names = save(tmp_path, "LlamaForCausalLM")
    assert known_targets(tmp_path, [*names, extra]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlavaForConditionalGeneration"]},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
        {"num_hidden_layers": "12"},
        {"num_hidden_layers": True},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_a_configuration_that_says_more_is_left_to_the_model(
    change: dict[str, Any], tmp_path: Path
) -> None:
    names = save(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert known_targets(tmp_path, names) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000])
def test_a_broken_configuration_is_left_to_the_model(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert known_targets(tmp_path, ["lm_head.weight"]) is None
    assert known_targets(tmp_path / "absent", ["lm_head.weight"]) is None
