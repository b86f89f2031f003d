"""``evaluate_models`` on real models: what is generated, and that nothing is generated twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from benchmarks.quality import tinyllava
from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.evaluation import EvaluationTask, GenerationOptions, evaluate_models, generating
from tailor_fast.models.inputs import load_processor
from tests.cli.running import CommandLine
from tests.models.processors import TEMPLATE, t5, text_tokenizer
from tests.patching.disk import llama_pair, llava_pair, write_scenes, write_texts

OPTIONS = GenerationOptions(batch_size=3, max_new_tokens=4)


@pytest.fixture
def tailor_fast(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The program, as a function of its arguments."""
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    llama_pair(folder, blocks=1)
    write_texts(folder / "texts.jsonl", count=7)
    return folder


def said(out: Path, name: str) -> list[str]:
    lines = (out / "predictions" / f"{name}.jsonl").read_text().splitlines()
    entries = {entry["sample"]: entry["prediction"] for entry in map(json.loads, lines[1:])}
    return [entries[place] for place in range(len(entries))]


def alone(model, processor, prompt: str, **inputs: torch.Tensor) -> str:
    """What the model says to one prompt, without padding."""
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = {**tokenizer(prompt, return_tensors="pt"), **inputs}
    ids = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    if not model.config.is_encoder_decoder:
        ids = ids[:, encoded["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_batches_say_what_single_prompts_do(made: Path, tmp_path: Path) -> None:
    models = {name: made / name for name in ("base", "tuned")}
    task = EvaluationTask("texts", made / "texts.jsonl")
    scores = evaluate_models(models, [task], tmp_path, options=OPTIONS)
    lines = [json.loads(line) for line in task.data.read_text().splitlines()]
    for name, path in models.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load_processor(path)
        expected = [alone(model, tokenizer, line["prompt"]) for line in lines]
        assert said(tmp_path, f"{name}.texts") == expected
        right = sum(text == line["answer"] for text, line in zip(expected, lines, strict=True))
        assert scores[name].old == {"texts": pytest.approx(100 * right / len(lines))}


def test_right_answers_count(made: Path, tmp_path: Path) -> None:
    """The data file is made of what the model says, but for one line."""
    first = EvaluationTask("texts", made / "texts.jsonl")
    evaluate_models({"base": made / "base"}, [first], tmp_path, options=OPTIONS)
    texts = said(tmp_path, "base.texts")
    lines = [json.loads(line) for line in (made / "texts.jsonl").read_text().splitlines()]
    answered = tmp_path / "answered.jsonl"
    with answered.open("w") as file:
        for index, (line, text) in enumerate(zip(lines, texts, strict=True)):
            answers = ["never", "this"] if index == 2 else ["never", text]
            file.write(json.dumps({"prompt": line["prompt"], "answers": answers}) + "\n")
    task = EvaluationTask("answered", answered, new=True)
    scores = evaluate_models({"base": made / "base"}, [task], tmp_path, options=OPTIONS)
    assert scores["base"].new["answered"] == pytest.approx(100 * 6 / 7)


def test_a_stopped_run_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = EvaluationTask("texts", made / "texts.jsonl")

    def run(out: Path) -> None:
        evaluate_models({"base": made / "base"}, [task], out, options=OPTIONS)

    run(tmp_path / "whole")
    calls, load = [], generating._load_model

    def counted(directory: Path, stop_after: int):
        model = load(directory)
        generate = model.generate

        def limited(*args, **kwargs):
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(1)
            return generate(*args, **kwargs)

        model.generate = limited
        return model

    monkeypatch.setattr(generating, "_load_model", lambda path: counted(path, 2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert len(said_so_far(tmp_path / "stopped")) == 6
    monkeypatch.setattr(generating, "_load_model", lambda path: counted(path, 100))
    run(tmp_path / "stopped")
    assert len(calls) == 3
    monkeypatch.setattr(generating, "_load_model", lambda _: pytest.fail("loaded again"))
    run(tmp_path / "stopped")
    files = [tmp_path / f / "predictions" / "base.texts.jsonl" for f in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def said_so_far(out: Path) -> list[str]:
    return (out / "predictions" / "base.texts.jsonl").read_text().splitlines()[1:]


def test_other_weights_and_other_templates_are_other_predictions(
    made: Path, tmp_path: Path
) -> None:
    task = EvaluationTask("texts", made / "texts.jsonl")
    evaluate_models({"m": made / "base"}, [task], tmp_path, options=OPTIONS)
    with pytest.raises(UsageError, match=r"another model .*; choose another place"):
        evaluate_models({"m": made / "tuned"}, [task], tmp_path, options=OPTIONS)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (made / "base").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    text_tokenizer(TEMPLATE).save_pretrained(copy)
    with pytest.raises(UsageError, match="another files"):
        evaluate_models({"m": copy}, [task], tmp_path, options=OPTIONS)
    other = evaluate_models({"m": copy}, [task], tmp_path, options=OPTIONS, overwrite=True)
    assert set(other) == {"m"}


def test_chats_are_asked_by_their_template(tmp_path: Path) -> None:
    base, _ = llama_pair(tmp_path, blocks=1)
    tokenizer = text_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(base)
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    out = tmp_path / "out"
    evaluate_models({"m": base}, [EvaluationTask("chats", chats)], out, options=OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer("<s>[user] a b [bot]", return_tensors="pt", add_special_tokens=False)
    ids["input_ids"] = torch.tensor(
        [tokenizer.convert_tokens_to_ids(["<s>", "[user]", "a", "b", "[bot]"])]
    )
    ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    generated = model.generate(**ids, max_new_tokens=4, do_sample=False)[:, 5:]
    expected = tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip()
    assert said(out, "m.chats") == [expected]
    chats.write_text(json.dumps({"messages": turns[:1]}) + "\n")
    with pytest.raises(InputError, match="line 1: its messages end with 'user'"):
        evaluate_models({"m": base}, [EvaluationTask("chats", chats)], out, options=OPTIONS)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    model = t5()
    model.save_pretrained(tmp_path / "t5")
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t5")
    data = write_texts(tmp_path / "texts.jsonl", count=5)
    task = EvaluationTask("texts", data)
    evaluate_models({"t5": tmp_path / "t5"}, [task], tmp_path / "out", options=OPTIONS)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    expected = [alone(model, tokenizer, line["prompt"]) for line in lines]
    assert said(tmp_path / "out", "t5.texts") == expected


def test_a_llava_from_the_command_line(tailor_fast: CommandLine, tmp_path: Path) -> None:
    base, tuned = llava_pair(tmp_path)
    old = write_scenes(tmp_path / "old.jsonl", count=5)
    new = write_scenes(tmp_path / "new.jsonl", count=4, seed=3)
    out = tmp_path / "out"
    arguments = (
        *("evaluate", tuned, "--base", base, "--old", old, "--new", new, "-o", out),
        *("--max-new-tokens", "3", "--batch-size", "2", "--metric", "new=cider"),
    )
    ran = tailor_fast(*arguments)
    assert ran.code == 0, ran.err
    head, *rows = ran.out.splitlines()[:3]
    assert head.split()[:2] == ["model", "old"]
    assert [row.split()[0] for row in rows] == ["base", "tuned"]
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["model"] for row in table] == ["base", "tuned"]
    assert json.loads((out / "results.json").read_text())["metrics"] == {
        "old": "exact",
        "new": "cider",
    }
    model = LlavaForConditionalGeneration.from_pretrained(base)
    processor = tinyllava.new_processor()
    from PIL import Image

    for line, text in zip(old.read_text().splitlines(), said(out, "base.old"), strict=True):
        sample = json.loads(line)
        image = Image.open(tmp_path / sample["images"][0]).convert("RGB")
        inputs = processor(text=sample["prompt"], images=image, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        ids = ids[:, inputs["input_ids"].shape[1] :]
        assert text == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    again = tailor_fast(*arguments, "-q")
    assert (again.code, again.out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--old", "texts.jsonl"), 2, "no model is given"),
        (("M",), 2, "no task is given"),
        (("M", "x/M", "--old", "texts.jsonl"), 2, "two models are called 'M'"),
        (("M", "--old", "texts.jsonl", "--metric", "f1"), 2, "metric must be one of"),
        (("M", "--old", "texts.jsonl", "--metric", "b=vqa"), 2, "no task is called 'b'"),
        (("M", "--old", "texts.jsonl", "--new", "texts.jsonl"), 2, "two tasks are called 'texts'"),
        (("M", "--old", "none.jsonl"), 65, "none.jsonl: cannot be read"),
        (("M", "--old", "texts.jsonl"), 65, "M: does not exist"),
    ],
)
def test_requests_that_cannot_be_met(
    tailor_fast: CommandLine,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_bytes((made / "texts.jsonl").read_bytes())
    ran = tailor_fast("evaluate", *arguments, "-o", "out")
    assert ran.code == code
    assert sentence in ran.err


def test_models_that_do_not_generate_are_refused(made: Path, tmp_path: Path) -> None:
    task = EvaluationTask("texts", made / "texts.jsonl")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (made / "base").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(InputError, match=r"architectures is \['NoSuchModel'\]"):
        evaluate_models({"m": broken}, [task], tmp_path / "out", options=OPTIONS)
    (broken / "config.json").unlink()
    with pytest.raises(InputError, match="configuration cannot be read"):
        evaluate_models({"m": broken}, [task], tmp_path / "out-2", options=OPTIONS)
    no_answer = tmp_path / "none.jsonl"
    no_answer.write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="line 1: has no answer"):
        evaluate_models(
            {"m": made / "base"}, [EvaluationTask("none", no_answer)], tmp_path / "out-3"
        )
    for name in ("../x", ".x", ""):
        with pytest.raises(UsageError, match="cannot be part of a file's name"):
            evaluate_models({name: made / "base"}, [task], tmp_path / "out-4")
    with pytest.raises(UsageError, match="'b' is none of the models m"):
        evaluate_models({"m": made / "base"}, [task], tmp_path / "out-5", base="b")
