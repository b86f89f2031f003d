"""An InstructBLIP of 0.9 million parameters, made of transformers' own classes.

ViT, Q-Former that reads the question too, linear projection, LLaMA decoder. It is asked the same
scenes as the small LLaVA, by the same ids: its four queries stand where LLaVA has image tokens.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)

from benchmarks.quality.tinyllava import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    INITIALIZER_RANGE,
    PAD,
    VISION,
    quiet,
    text_config,
)

_QUESTION_WORDS = 2


def _config() -> InstructBlipConfig:
    qformer = InstructBlipQFormerConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        encoder_hidden_size=VISION["hidden_size"],
        cross_attention_frequency=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=PAD,
    )
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION),
        qformer_config=qformer,
        text_config=text_config(width=96, layers=3),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE,
        initializer_range=INITIALIZER_RANGE,
    )


def new_model(seed: int) -> Any:
    """Return an untrained ``InstructBlipForConditionalGeneration`` in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(_config())
        # The class starts from zeros, out of which the queries would never grow apart.
        torch.nn.init.normal_(model.query_tokens)
    model.generation_config.update(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, suppress_tokens=[IMAGE]
    )
    return model.eval()


def save(model: Any, folder: Path) -> None:
    """Write the model in float32 to ``folder``."""
    with quiet():
        model.save_pretrained(folder)


def load(folder: Path) -> Any:
    """Read a model back by ``from_pretrained``, ready for generation."""
    with quiet():
        return InstructBlipForConditionalGeneration.from_pretrained(folder).eval()


def question_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """Return what the Q-Former reads, int64 ``[n, 2]``: the two words of each prompt."""
    begin = 1 + IMAGE_TOKENS
    return input_ids[:, begin : begin + _QUESTION_WORDS]
