"""The families: how a model is built, what reads its data, and how it generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    OPTConfig,
    T5Config,
)

from tests.models.processors import instructblip_processor, text_tokenizer
from tests.patching.disk import moved, save_pair, write_texts

IMAGE = 10  # the id behind those of the word-level tokenizer
_SIDE, _PATCH = 16, 8
TEXT = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        build: makes the model.
        processor: makes what reads its data.
        sees: text in front of a prompt that stands for its picture; None for text models.
        frozen: names of parameters that fine-tuning leaves alone.
        uncalled: a regular expression for layers that the data never reaches.
    """

    build: Callable[[], Any]
    processor: Callable[[], Any] = text_tokenizer
    sees: str | None = None
    frozen: str = "vision"


def save_family(family: Family, folder: Path) -> tuple[Path, Path, Path]:
    """Write base, tuned and data; all but the vision tower has moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = family.build().eval()
    names = [name for name, _ in base.named_parameters() if family.frozen not in name]
    tuned = moved(base, tuple(names))
    paths = save_pair(folder, base, tuned, family.processor())
    data = folder / "new.jsonl"
    if family.sees is None:
        return (*paths, write_texts(data, count=10))
    return (*paths, _write_pictures(data, family.sees))


def _write_pictures(path: Path, sees: str, count: int = 6) -> Path:
    """Prompts of two lengths with pictures of two shapes."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for index in range(count):
            pixels = generator.integers(0, 255, (16, 16 + 8 * (index % 2)), dtype=np.uint8)
            Image.fromarray(pixels).save(path.parent / f"{index}.png")
            prompt = f"{sees} a b"[: len(sees) + 2 + 2 * (index % 2)]
            line = {"prompt": prompt, "answer": "c d", "images": [f"{index}.png"]}
            file.write(json.dumps(line) + "\n")
    return path


def _causal(kind: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(**{**TEXT, **options})
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return build


def _gpt2() -> Any:
    ids = {name: TEXT[name] for name in ("vocab_size", "pad_token_id", "bos_token_id")}
    config = transformers.GPT2Config(
        **ids, eos_token_id=2, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
    )
    return transformers.GPT2LMHeadModel(config)


def _t5_config() -> Any:
    return T5Config(
        vocab_size=16,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 32]],
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _image_tokenizer() -> Any:
    tokenizer = text_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def _llava_processor() -> Any:
    return transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": _SIDE, "width": _SIDE}, do_center_crop=False
        ),
        tokenizer=_image_tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next_processor() -> Any:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE},
        crop_size={"height": _SIDE, "width": _SIDE},
        image_grid_pinpoints=[[16, 32], [32, 32]],
    )
    return transformers.LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=_image_tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _blip(kind: str, text: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        qformer = {
            **{name: value for name, value in VISION.items() if "size" not in name},
            "vocab_size": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "pad_token_id": 0,
            "max_position_embeddings": 32,
            "encoder_hidden_size": 32,
        }
        config = getattr(transformers, f"{kind}Config")(
            vision_config=getattr(transformers, f"{kind}VisionConfig")(**VISION),
            qformer_config=getattr(transformers, f"{kind}QFormerConfig")(**qformer),
            text_config=text(),
            num_query_tokens=2,
            image_token_index=IMAGE,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _opt() -> Any:
    ids = {name: value for name, value in TEXT.items() if "token" in name}
    return OPTConfig(
        **ids,
        vocab_size=16,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.1,
    )


def _blip2_processor() -> Any:
    images = BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    return transformers.Blip2Processor(images, text_tokenizer(), num_query_tokens=2)


def _qwen_vl(kind: str, **vision: Any) -> Callable[[], Any]:
    def build() -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        config = getattr(transformers, f"{kind}Config")(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "num_heads": 4,
                "patch_size": _PATCH,
                "hidden_size": 32,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                **vision,
            },
            image_token_id=IMAGE,
            video_token_id=11,
            vision_start_token_id=12,
            vision_end_token_id=13,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


_LLAMA = transformers.LlamaConfig
_EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "llama": Family(_causal("Llama")),
    "mistral": Family(_causal("Mistral")),
    "qwen2": Family(_causal("Qwen2")),
    "qwen3": Family(_causal("Qwen3", head_dim=8)),
    "gemma": Family(_causal("Gemma", head_dim=8)),
    "gpt2": Family(_gpt2),
    "t5": Family(
        lambda: transformers.T5ForConditionalGeneration(_t5_config()),
        lambda: text_tokenizer(begin="", end=" </s>"),
    ),
    "mixtral": Family(_causal("Mixtral", num_local_experts=4, **_EXPERTS)),
    "qwen2-moe": Family(
        _causal(
            "Qwen2Moe",
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            **_EXPERTS,
        )
    ),
    "llava": Family(_llava, _llava_processor, "<image>"),
    "llava-next": Family(_llava_next, _llava_next_processor, "<image>"),
    "instructblip": Family(
        _blip("InstructBlip", lambda: _LLAMA(**TEXT)), instructblip_processor, ""
    ),
    "instructblip-t5": Family(_blip("InstructBlip", _t5_config), instructblip_processor, ""),
    "blip-2": Family(_blip("Blip2", _opt), _blip2_processor, ""),
}
# Their processors need torchvision, so that their data comes as tensors.
PREPARED = {
    "qwen2-vl": Family(_qwen_vl("Qwen2VL", embed_dim=32, mlp_ratio=2), frozen="visual"),
    "qwen2.5-vl": Family(
        _qwen_vl(
            "Qwen2_5_VL",
            out_hidden_size=32,
            intermediate_size=48,
            fullatt_block_indexes=[1],
            window_size=16,
        ),
        frozen="visual",
    ),
}
