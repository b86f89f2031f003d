"""Adapters that cannot be merged exactly are refused: which tensor, what is wrong, the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_fast.checkpoint import CheckpointError, open_checkpoint, open_tuned
from tests.checkpoint.adapters import factors, save_adapter, save_base
from tests.checkpoint.test_adapter import Tensors, no_names, opened, random


def refused(folder: Path, lora: Path, base: Tensors | None = None) -> str:
    path = save_base(folder / "base", base or {"q.weight": random(8, 6), "q.bias": random(8)})
    with pytest.raises(CheckpointError) as caught, opened(path, lora):
        pass
    assert caught.value.exit_code == 65
    return str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type must be LORA; got 'LOHA'; merge it with"),
    "a key of tomorrow": ({"use_xlora": True}, "'use_xlora' is 'true', which is not known here; m"),
    "fused experts": (
        {"target_parameters": ["e"]},
        "'target_parameters' is '[\"e\"]', which is",
    ),
    "pissa": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', which changes",
    ),
    "rank": ({"r": 0}, "r must be a whole number of at least 1; got '0'; save the adapter again"),
    "rank of a pattern": ({"rank_pattern": {"q": "2"}}, "rank_pattern must be a whole number"),
    "alpha": ({"lora_alpha": "4"}, "lora_alpha must be a finite number; got '4'"),
    "flag": ({"use_rslora": 1}, "use_rslora must be true or false; got '1'"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern must be an object of patterns; got '[1]'"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no regular expression"),
    "name": ({"base_model_name_or_path": 3}, "base_model_name_or_path must be text; got '3'"),
    "other rank": ({"r": 3}, "rank must be 3, as adapter_config.json says; got A [2, 6] and B [8"),
    "no lengths": (
        {"use_dora": True},
        "is a DoRA of 'q', whose lengths are not those",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(name: str, tmp_path: Path) -> None:
    config, sentence = CONFIGS[name]
    message = refused(tmp_path, save_adapter(tmp_path / "lora", factors("q", 8, 6), **config))
    assert sentence in message
    assert message.startswith(str(tmp_path / "lora" / "adapter_"))


FILES: dict[str, tuple[Callable[[], Tensors], str]] = {
    "another model's": (
        lambda: factors("x", 8, 6) | factors("y", 8, 6),
        "changes 2 layers that {base} lacks: 'x', 'y'; it was trained on 'the-base'; give the mode",
    ),
    "another size": (
        lambda: factors("q", 8, 7),
        "A [2, 7] and B [8, 2] must fit [8, 6] of 'q.weight' in BASE; give the model that",
    ),
    "half": (
        lambda: {"q.lora_A.weight": torch.zeros(2, 6)},
        "the factors of 'q' must be A and B; got 'lora_A'; merge it with peft",
    ),
    "unknown part": (
        lambda: factors("q", 8, 6) | {"q.lora_C.weight": torch.zeros(2)},
        "tensor 'base_model.model.q.lora_C.weight': is no part of a LoRA that is known here",
    ),
    "twice": (
        lambda: factors("q", 8, 6) | {"q.lora_A.default.weight": torch.zeros(2, 6)},
        "means the same as another of its tensors; save the adapter again",
    ),
    "factors and the tensor": (
        lambda: factors("q", 8, 6) | {"q.weight": torch.zeros(8, 6)},
        "means the same as another of its tensors",
    ),
    "bias that is not there": (
        lambda: factors("n", 3, 6) | {"n.lora_B.bias": torch.zeros(3)},
        "changes 'n.bias', which BASE lacks",
    ),
    "lengths without DoRA": (
        lambda: factors("q", 8, 6) | {"q.lora_magnitude_vector": torch.zeros(8)},
        "must be 8 lengths of a DoRA; got [8]",
    ),
    "no matrix": (lambda: factors("c", 8, 6), "changes BF16 [8, 6, 1], no matrix"),
    "quantised": (lambda: factors("u", 8, 6), "changes a tensor of dtype U8; give the base model"),
    "resized": (
        lambda: factors("q", 8, 6) | {"e.weight": torch.zeros(11, 3)},
        "is [11, 3] and replaces [10, 3] of 'e.weight'; put the config.json of the resized model",
    ),
    "whole of integers": (
        lambda: factors("q", 8, 6) | {"e.weight": torch.zeros(10, 3, dtype=torch.int32)},
        "is I32 and replaces BF16 of 'e.weight'",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_adapters_that_are_refused(name: str, tmp_path: Path) -> None:
    base = {
        "q.weight": random(8, 6),
        "n.weight": random(3, 6),
        "c.weight": random(8, 6, 1),
        "u.weight": torch.zeros(8, 6, dtype=torch.uint8),
        "e.weight": random(10, 3),
    }
    tensors, sentence = FILES[name]
    message = refused(tmp_path, save_adapter(tmp_path / "lora", tensors()), base)
    assert sentence.format(base=tmp_path / "base") in message
    assert message.startswith(f"{tmp_path / 'lora' / 'adapter_model.safetensors'}: ")


def test_a_square_layer_under_a_flag_that_others_belie(tmp_path: Path) -> None:
    tensors = factors("q", 8, 6) | factors("s", 4, 4)
    lora = save_adapter(tmp_path / "lora", tensors, fan_in_fan_out=True)
    message = refused(tmp_path, lora, {"q.weight": random(8, 6), "s.weight": random(4, 4)})
    assert "fan_in_fan_out is true, which is wrong for 'q'; whether it holds for 's'" in message


def test_pickles_and_missing_files(tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", factors("q", 8, 6))
    weights = lora / "adapter_model.safetensors"
    (lora / "non_lora_trainables.bin").write_bytes(b"PK")
    base = {"q.weight": random(8, 6)}
    message = refused(tmp_path, lora, base)
    assert "non_lora_trainables.bin: is a pickle, which may run code when loaded" in message
    (lora / "non_lora_trainables.bin").unlink()
    weights.rename(lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: is a pickle, .*; save the ad"):
        open_tuned(lora, open_checkpoint(tmp_path / "base"), no_names)
    (lora / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapter_config\.json without adapter_model"):
        open_tuned(lora, open_checkpoint(tmp_path / "base"), no_names)
    (lora / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is it a model or an adapter"):
        open_tuned(lora, open_checkpoint(tmp_path / "base"), no_names)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "must be a valid configuration"),
        ('{"r": 1, "r": 2}', "expected every name once"),
        ("[1]", "must be a valid configuration"),
        (json.dumps({"x": "y" * (1 << 20)}), "must have at most 1048576 bytes"),
    ],
)
def test_text_that_is_no_configuration(text: str, problem: str, tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", factors("q", 8, 6))
    (lora / "adapter_config.json").write_text(text)
    assert problem in refused(tmp_path, lora)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", factors("q", 8, 6))
    with pytest.raises(CheckpointError, match="it is a PEFT adapter; give it as TUNED"):
        open_checkpoint(lora)
