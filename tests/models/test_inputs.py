"""Batches as the model takes them, and every way in which samples cannot become one."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import scenes, tinyllava
from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.models.calling import caller
from tailor_fast.models.inputs import make_batches
from tailor_fast.models.samples import Sample, read_samples
from tailor_fast.models.tokens import TokenMasks
from tailor_fast.testing import assert_within
from tests.models.processors import (
    BOS,
    BOT,
    EOS,
    PAD,
    TEMPLATE,
    USER,
    A,
    B,
    C,
    D,
    gpt2,
    instructblip_processor,
    llava_processor,
    t5,
    text_tokenizer,
)


def sample(line: int = 1, **values: Any) -> Sample:
    return Sample(Path("data.jsonl"), line, **values)


def chat(*turns: tuple[str, Any], images: tuple[Path, ...] = ()) -> Sample:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return sample(messages=messages, images=images)


def batches(samples: list[Sample], processor: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    return make_batches(samples, processor, **{"batch_size": 8, "max_length": 64, **options})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    return path


def test_prompt_and_answer_become_one_text_padded_on_the_right() -> None:
    samples = [
        sample(prompt="a b", answer="c"),
        sample(prompt="a\n", answer="d"),
        sample(prompt="b"),
    ]
    (batch,) = batches(samples, text_tokenizer())
    assert batch["input_ids"].tolist() == [
        [BOS, A, B, C, EOS],
        [BOS, A, D, EOS, PAD],
        [BOS, B, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert "labels" not in batch


def test_a_tokenizer_that_writes_the_end_itself_gets_no_second_one() -> None:
    (batch,) = batches([sample(prompt="a", answer="b")], text_tokenizer(end=" </s>"))
    assert batch["input_ids"].tolist() == [[BOS, A, B, EOS]]


def test_a_chat_is_rendered_by_the_template_which_has_its_own_special_tokens() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    talk = chat(("user", parts), ("assistant", "c"))
    (batch,) = batches([talk], text_tokenizer(TEMPLATE))
    assert batch["input_ids"].tolist() == [[BOS, USER, A, B, BOT, C, EOS]]


def test_batches_hold_the_order_and_the_size() -> None:
    samples = [sample(prompt=word) for word in "abcda"]
    made = batches(samples, text_tokenizer(), batch_size=2)
    assert [batch["input_ids"][:, 1].tolist() for batch in made] == [[A, B], [C, D], [A]]


def test_padding_moves_no_position() -> None:
    samples = [sample(prompt="a b c d a"), sample(prompt="b a"), sample(prompt="c")]
    model, tokenizer = gpt2(), text_tokenizer()
    (together,) = batches(samples, tokenizer, config=model.config)
    with torch.no_grad():
        padded = model(**together).logits
        for row, alone in enumerate(samples):
            (single,) = batches([alone], tokenizer)
            length = single["input_ids"].shape[1]
            plain = model(**single).logits[0]
            exact = gpt2().double()(**single).logits[0]
            assert_within(padded[row, :length], exact, plain)


def test_pictures_are_those_that_the_processor_makes(tmp_path: Path) -> None:
    drawn = scenes.draw("list", "test", 3, seed=1)
    scenes.write([drawn], tmp_path / "data.jsonl")
    (batch,) = batches(read_samples(tmp_path / "data.jsonl"), llava_processor())
    expected = tinyllava.encode([drawn])
    prompt = tinyllava.PROMPT_LENGTH
    assert torch.equal(batch["pixel_values"], expected.pixel_values)
    assert torch.equal(batch["input_ids"][:, :prompt], expected.input_ids)
    assert torch.equal(batch["input_ids"][:, prompt:], expected.answer_ids)
    (half,) = batches(
        read_samples(tmp_path / "data.jsonl"), llava_processor(), dtype=torch.bfloat16
    )
    assert half["pixel_values"].dtype == torch.bfloat16
    assert half["input_ids"].dtype == torch.int64


def test_samples_with_and_without_pictures_share_no_batch(picture: Path) -> None:
    seen = {"images": (picture,)}
    samples = [
        sample(prompt="<image> what 3", **seen),
        sample(prompt="all"),
        sample(prompt="<image> <image> what 5", images=(picture, picture)),
        sample(prompt="even"),
    ]
    first, second = batches(samples, llava_processor())
    assert first["pixel_values"].shape == (3, 3, 16, 16)
    assert first["attention_mask"].sum(1).tolist() == [7, 11]
    assert "pixel_values" not in second
    assert second["input_ids"].shape == (2, 2)
    model = tinyllava.new_model(0)
    for batch in (first, second):
        caller(model)(model, batch)


def test_a_chat_with_a_picture_takes_the_processors_template(picture: Path) -> None:
    question = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what 3"}]
    talk = chat(("user", question), ("assistant", "5"), images=(picture,))
    (batch,) = batches([talk], llava_processor(template=True))
    words = [tinyllava.IDS[word] for word in ("what", "3", "5")]
    bos, image, eos = tinyllava.BOS, tinyllava.IMAGE, tinyllava.EOS
    assert batch["input_ids"].tolist() == [[bos, *[image] * 4, *words, eos]]


def test_a_q_former_reads_the_prompt_alone_and_never_padding(picture: Path) -> None:
    seen = {"images": (picture,)}
    samples = [
        sample(prompt="a b", answer="c", **seen),
        sample(prompt="a", answer="d", **seen),
        sample(prompt="b a", answer="c d", **seen),
    ]
    first, second = batches(samples, instructblip_processor())
    assert first["qformer_input_ids"].tolist() == [[BOS, A, B], [BOS, B, A]]
    assert second["qformer_input_ids"].tolist() == [[BOS, A]]
    assert all(batch["qformer_attention_mask"].all() for batch in (first, second))
    assert first["input_ids"][:, 2:].tolist() == [[BOS, A, B, C, EOS, PAD], [BOS, B, A, C, D, EOS]]
    with pytest.raises(InputError, match="line 1: has no image; a model with a Q-Former needs one"):
        batches([sample(prompt="a", answer="b")], instructblip_processor())


def test_the_decoder_of_an_encoder_decoder_reads_the_answer() -> None:
    model, tokenizer = t5(), text_tokenizer(begin="", end=" </s>")
    samples = [
        sample(prompt="a b", answer="c"),
        sample(prompt="a", answer="d"),
        sample(prompt="b a", answer="d"),
    ]
    first, second = batches(samples, tokenizer, config=model.config)
    assert first["input_ids"].tolist() == [[A, B, EOS], [B, A, EOS]]
    labels = torch.tensor([[C, EOS], [D, EOS]])
    assert torch.equal(first["decoder_input_ids"], model._shift_right(labels))
    assert second["input_ids"].tolist() == [[A, EOS]]
    for batch in (first, second):  # the encoder's padding would enter its layers' statistics
        assert batch["attention_mask"].all()
        assert batch["decoder_attention_mask"].all()
        caller(model)(model, batch)


def test_an_encoder_decoder_needs_answers_and_a_start_token() -> None:
    config, tokenizer = t5().config, text_tokenizer()
    with pytest.raises(InputError, match="line 1: has no answer; an encoder-decoder needs one"):
        batches([sample(prompt="a")], tokenizer, config=config)
    with pytest.raises(UsageError, match="tokens 'answer' is for decoders"):
        batches([sample(prompt="a", answer="b")], tokenizer, config=config, tokens="answer")
    config.decoder_start_token_id = None
    with pytest.raises(InputError, match="has no decoder_start_token_id"):
        batches([sample(prompt="a", answer="b")], tokenizer, config=config)


def test_answer_tokens_are_those_behind_the_prompt() -> None:
    samples = [sample(prompt="a b", answer="c"), sample(prompt="a", answer="d b")]
    (batch,) = batches(samples, text_tokenizer(), tokens="answer")
    assert batch["token_mask"].long().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    (batch,) = batches(samples, text_tokenizer(end=" </s>"), tokens="answer")
    assert batch["token_mask"].long().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    with pytest.raises(InputError, match="line 1: has no answer; tokens 'answer' needs one"):
        batches([sample(prompt="a")], text_tokenizer(), tokens="answer")


def test_every_answer_of_a_chat_counts(picture: Path) -> None:
    talk = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d a"))
    (batch,) = batches([talk], text_tokenizer(TEMPLATE), tokens="answer")
    assert batch["input_ids"].tolist() == [[BOS, USER, A, BOT, B, EOS, USER, C, BOT, D, A, EOS]]
    assert batch["token_mask"].long().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]
    shown = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what 3"}]
    twice = chat(
        ("user", shown),
        ("assistant", "5"),
        ("user", shown),
        ("assistant", "7"),
        images=(picture,) * 2,
    )
    (batch,) = batches([twice], llava_processor(template=True), tokens="answer")
    assert batch["token_mask"].long().tolist() == [[0] * 7 + [1, 1] + [0] * 6 + [1, 1]]


def test_the_statistics_count_what_the_mask_says() -> None:
    class Strict(torch.nn.Module):
        """Takes what a model takes, and not the mask."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return input_ids * attention_mask

    (batch,) = batches([sample(prompt="a b", answer="c")], text_tokenizer(), tokens="answer")
    caller(Strict())(Strict(), batch)
    counted = TokenMasks(gpt2()).find("transformer.h.0.attn", torch.zeros(1, 5, 16), batch)
    assert counted is not None
    assert counted.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 3},
            "has 4 tokens, the limit is 3; shorten it, leave it out or raise --max",
        ),
        ({"config": gpt2().config}, "has 9 tokens, the model has 8 positions; shorten it or leave"),
    ],
)
def test_a_sample_that_is_too_long_is_named(options: dict[str, Any], message: str) -> None:
    text = "a b c" if "max_length" in options else "a a a a a a a a"
    samples = [sample(1, prompt="a"), sample(7, prompt=text)]
    with pytest.raises(InputError, match=re.escape(f"data.jsonl line 7: {message}")):
        batches(samples, text_tokenizer(), **options)


def test_what_the_processor_refuses_is_named(picture: Path, tmp_path: Path) -> None:
    good = sample(1, prompt="<image> all", images=(picture,))
    bad = sample(2, prompt="all", images=(picture,))
    with pytest.raises(InputError, match=r"line 2: the processor refuses it: .*Found total 0"):
        batches([good, bad], llava_processor())
    with pytest.raises(InputError, match=r"line 1: the processor refuses it: .*takes no images"):
        batches([good], text_tokenizer())
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:45])
    with pytest.raises(InputError, match=r"line 3: image .*broken\.png cannot be read: "):
        batches([good, sample(3, prompt="<image>", images=(broken,))], llava_processor())
    with pytest.raises(InputError, match="there are no samples; expected at least one"):
        batches([], text_tokenizer())


def test_samples_that_share_no_batch_are_told_the_remedy(picture: Path) -> None:
    class Picky:
        """Takes one sample at a time."""

        tokenizer = text_tokenizer()

        def __call__(self, *, text: list[str], **_: Any) -> Any:
            if len(text) > 1:
                raise ValueError("sizes differ")
            return self.tokenizer(text, return_tensors="pt")

    samples = [sample(4, prompt="a"), sample(9, prompt="b")]
    assert len(batches(samples, Picky(), batch_size=1)) == 2
    with pytest.raises(
        InputError, match=r"line 4 to 9: .*not in one batch: sizes differ; use --ba"
    ):
        batches(samples, Picky())


def test_a_chat_without_a_template_or_refused_by_it_is_named() -> None:
    with pytest.raises(InputError, match="line 1: has 'messages', but the checkpoint has no chat"):
        batches([chat(("user", "a"))], text_tokenizer())
    with pytest.raises(InputError, match="line 1: the chat template refuses it: no system role"):
        batches([chat(("system", "a"))], text_tokenizer(TEMPLATE))
