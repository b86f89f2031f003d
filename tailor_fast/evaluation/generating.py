"""What a model says to the prompts of a data file, by transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint import Hashed, open_checkpoint
from tailor_fast.models.inputs import load_processor, make_prompts
from tailor_fast.models.samples import Sample
from tailor_fast.models.skeleton import named_classes
from tailor_fast.models.texts import REFUSALS, first_line, tokenizer_of

_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class GenerationOptions:
    """How predictions are made; greedy, or by beam search.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        batch_size: prompts at once.
        max_new_tokens: longest answer.
        max_length: longest prompt in tokens.
        num_beams: 1 is greedy.
    """

    device: str = "cpu"
    batch_size: int = 8
    max_new_tokens: int = 32
    max_length: int = 2048
    num_beams: int = 1

    def facts(self) -> dict[str, Any]:
        """What of it decides what is said; the size of a batch too, in the last bit of a logit."""
        kept = asdict(self)
        del kept["max_length"]  # only refuses
        kept["device"] = torch.device(self.device).type
        return {**kept, "transformers": version("transformers"), "torch": version("torch")}


class Speaker:
    """A model that answers prompts; loaded when the first one comes.

    Args:
        directory: checkpoint with its processor or tokenizer.
        options: how.
    """

    def __init__(self, directory: Path, options: GenerationOptions) -> None:
        self.directory = directory
        self._options = options
        self._loaded: tuple[Any, Any] | None = None

    def digest(self) -> str:
        """Identity of the weights; reads them once."""
        with open_checkpoint(self.directory) as checkpoint:
            return Hashed(checkpoint).root(bytearray(_BUFFER_BYTES))

    def answers(self, samples: Sequence[Sample], done: frozenset[int]) -> Iterator[dict[int, str]]:
        """Yield predictions by the samples' places, batch by batch, but for those that are done.

        Raises:
            InputError: the model or its processor cannot be loaded, or a sample is not usable.
        """
        model, processor = self._load()
        options = self._options
        batches = make_prompts(
            samples,
            processor,
            batch_size=options.batch_size,
            max_length=options.max_length,
            dtype=model.dtype,
            config=model.config,
        )
        tokenizer = tokenizer_of(processor)
        for batch in batches:
            if done.issuperset(batch.places):
                continue
            inputs = {key: value.to(options.device) for key, value in batch.encode().items()}
            with torch.inference_mode():
                ids = model.generate(
                    **inputs,
                    max_new_tokens=options.max_new_tokens,
                    num_beams=options.num_beams,
                    do_sample=False,
                )
            said = _behind(ids, inputs["input_ids"])
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            yield {place: text.strip() for place, text in zip(batch.places, texts, strict=True)}

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            model = _load_model(self.directory).to(self._options.device)
            self._loaded = model, load_processor(self.directory)
        return self._loaded


def _behind(ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """What was added to the prompt; a model that gives nothing else is left as it is."""
    length = prompt.shape[1]
    repeats = ids.shape[1] >= length and torch.equal(ids[:, :length], prompt)
    return ids[:, length:] if repeats else ids


def _load_model(directory: Path) -> Any:
    """The model that ``config.json`` names, with its weights; no network, no code."""
    import transformers

    path, named = directory / "config.json", named_classes(directory)
    kind = getattr(transformers, named[0], None) if named else None
    if kind is None or not hasattr(kind, "generate"):
        raise InputError(
            f"{path}: architectures is {named}; expected a model class of transformers"
            f" {transformers.__version__} that generates"
        )
    try:
        with _no_bars():
            model = kind.from_pretrained(
                str(directory), dtype="auto", local_files_only=True, use_safetensors=True
            )
    except REFUSALS as error:
        raise InputError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    return model.eval()


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
