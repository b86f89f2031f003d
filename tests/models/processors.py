"""Processors and models of a few kilobytes, made of transformers' own classes."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import (
    BlipImageProcessorPil,
    GPT2Config,
    GPT2LMHeadModel,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.quality import tinyllava

PAD, BOS, EOS, UNK, A, B, C, D, USER, BOT = range(10)
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "[user]", "[bot]")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '[user] ' if m['role'] == 'user' else '[bot] ' }}{{ m['content'] }}"
    "{{ ' ' + eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{{ '[bot]' if add_generation_prompt else '' }}"
)
IMAGE_TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
)


def text_tokenizer(
    template: str | None = None, *, begin: str = "<s> ", end: str = "", pad: str | None = "<pad>"
) -> Any:
    """A word-level tokenizer that puts ``begin`` before a text and ``end`` behind it."""
    ids = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = post_processors.TemplateProcessing(
        single=f"{begin}$A{end}", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        padding_side="left",
        chat_template=template,
    )


def llava_processor(*, template: bool = False) -> Any:
    """The quality benchmark's processor: four image tokens per 16x16 picture."""
    processor = tinyllava.new_processor()
    processor.chat_template = IMAGE_TEMPLATE if template else None
    return processor


def instructblip_processor() -> Any:
    """Two query tokens; both tokenizers begin with ``<s>``."""
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    return InstructBlipProcessor(images, text_tokenizer(), text_tokenizer(), num_query_tokens=2)


def gpt2() -> Any:
    """A model with learned positions, which notices where padding stands."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    return GPT2LMHeadModel(config).eval()


def t5() -> Any:
    """An encoder-decoder."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config).eval()
