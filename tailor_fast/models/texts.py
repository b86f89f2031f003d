"""Samples as text: the checkpoint's chat template, or prompt and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tailor_fast._core.errors import InputError
from tailor_fast.models.samples import Sample, image_parts

# What processors and templates of all kinds raise at input that they do not take.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OSError)


@dataclass(frozen=True)
class Text:
    """A sample as text.

    Attributes:
        sample: where it comes from.
        text: what the model reads; the prompt alone for an encoder-decoder.
        prompt: text before the last answer.
        answer: the last answer; empty when the sample has none.
        special_tokens: whether the tokenizer adds its special tokens; a template has its own.
        lengths: tokens of the sequences beside a decoder's own, which only samples of equal lengths
            may share: no mask that the decoder's layers know covers padding in them.
    """

    sample: Sample
    text: str
    prompt: str
    answer: str
    special_tokens: bool
    lengths: tuple[int, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """Samples of one kind may share a batch."""
        return bool(self.sample.images), self.special_tokens, self.lengths


class Renderer:
    """Turns samples into text by the rules of one processor.

    Args:
        processor: transformers' processor or tokenizer.
        encoder_decoder: whether answers go to a decoder of their own.
    """

    def __init__(self, processor: Any, *, encoder_decoder: bool) -> None:
        self._processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._qformer = getattr(processor, "qformer_tokenizer", None)
        self._encoder_decoder = encoder_decoder
        ids = self._tokenizer("a")["input_ids"]
        adds_end = bool(ids) and ids[-1] == self._tokenizer.eos_token_id
        self._end = "" if adds_end else self._tokenizer.eos_token or ""

    def render(self, sample: Sample) -> Text:
        """Turn one sample into text.

        Raises:
            InputError: a chat without a template or refused by it, or a part that the model needs
                and the sample lacks.
        """
        text = self._chat(sample) if sample.messages else self._plain(sample)
        if self._encoder_decoder:
            if not text.answer:
                raise InputError(f"{sample.where}: has no answer; an encoder-decoder needs one")
            text = replace(text, text=text.prompt, answer=text.answer + self._end)
            lengths = [len(ids) for ids in self._tokenizer([text.text, text.answer])["input_ids"]]
            text = replace(text, lengths=tuple(lengths))
        if self._qformer is not None:
            if not sample.images:
                raise InputError(f"{sample.where}: has no image; a model with a Q-Former needs one")
            read = len(self._qformer(text.prompt)["input_ids"])
            text = replace(text, lengths=(*text.lengths, read))
        return text

    def turns(self, text: Text) -> Iterator[tuple[Text, Text]]:
        """For each answer of a sample: the text before it, and the text up to its end."""
        sample = text.sample
        if not sample.messages:
            yield replace(text, text=text.prompt), text
            return
        for index, message in enumerate(sample.messages):
            if message["role"] == "assistant":
                before = self._template(sample, index, generation_prompt=True)
                upto = self._template(sample, index + 1)
                yield (
                    replace(text, text=before, sample=_head(sample, index)),
                    replace(text, text=upto, sample=_head(sample, index + 1)),
                )

    def _plain(self, sample: Sample) -> Text:
        prompt = sample.prompt or ""
        if sample.answer is None:
            return Text(sample, prompt, prompt, "", special_tokens=True)
        gap = "" if prompt[-1:].isspace() or sample.answer[:1].isspace() else " "
        text = f"{prompt}{gap}{sample.answer}{self._end}"
        return Text(sample, text, prompt, sample.answer, special_tokens=True)

    def _chat(self, sample: Sample) -> Text:
        text = self._template(sample, len(sample.messages))
        # The rule of transformers: a tokenizer adds nothing to a template's text, a processor does
        # unless the text begins with the token that it would add.
        bos = self._tokenizer.bos_token
        begun = bos is not None and text.startswith(bos)
        special = self._processor is not self._tokenizer and not begun
        last = sample.messages[-1]
        if last["role"] != "assistant":
            return Text(sample, text, text, "", special)
        prompt = self._template(sample, len(sample.messages) - 1, generation_prompt=True)
        return Text(sample, text, prompt, _joined(last), special)

    def _template(self, sample: Sample, count: int, *, generation_prompt: bool = False) -> str:
        """Render the first ``count`` messages."""
        from jinja2 import TemplateError

        owners = (self._processor, self._tokenizer)
        owner = next((owner for owner in owners if getattr(owner, "chat_template", None)), None)
        if owner is None:
            raise InputError(
                f"{sample.where}: has 'messages', but the checkpoint has no chat template; write"
                " 'prompt' and 'answer' instead"
            )
        shaped = _as_string if owner is self._tokenizer else _as_parts
        messages = [shaped(message) for message in sample.messages[:count]]
        try:
            rendered: str = owner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, *REFUSALS) as error:
            raise InputError(
                f"{sample.where}: the chat template refuses it: {first_line(error)}"
            ) from error
        return rendered


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


Message = Mapping[str, Any]


def _as_parts(message: Message) -> dict[str, Any]:
    """Templates of processors iterate over parts."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


def _as_string(message: Message) -> dict[str, Any]:
    """Templates of tokenizers join strings; parts with images are left to them."""
    return dict(message) if image_parts(message) else {**message, "content": _joined(message)}


def _joined(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _head(sample: Sample, count: int) -> Sample:
    """The first ``count`` messages with their images."""
    messages = sample.messages[:count]
    shown = sum(len(image_parts(message)) for message in messages)
    return replace(sample, messages=messages, images=sample.images[:shown])
