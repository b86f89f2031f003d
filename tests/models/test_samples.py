"""Reading data files: both forms, strictness, and the line in every message."""

import json
from pathlib import Path
from typing import Any

import pytest

from tailor_fast._core.errors import InputError
from tailor_fast.models.samples import (
    HELD_LEAST,
    HELD_MOST,
    Part,
    count_samples,
    hash_samples,
    part_of,
    read_samples,
    scattered,
)

PARTS: tuple[Part, Part] = ("fitted", "held")


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_both_forms_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    picture = tmp_path / "img" / "a.png"
    picture.write_bytes(b"x")
    chat = [
        {"role": "user", "content": [{"type": "image", "path": "img/a.png"}]},
        {"role": "assistant", "content": "yes"},
    ]
    path = write(
        tmp_path,
        {"prompt": "<image> what", "answer": "a cat", "images": ["img/a.png"]},
        "",
        {"messages": chat},
        {"prompt": "text alone"},
    )
    plain, talk, alone = read_samples(path)
    assert (plain.line, plain.prompt, plain.answer) == (1, "<image> what", "a cat")
    assert plain.images == talk.images == (picture,)
    assert (talk.line, talk.prompt, talk.answer) == (3, None, None)
    assert talk.messages[0]["content"] == [{"type": "image", "path": str(picture)}]
    assert talk.messages[1] == chat[1]
    assert (alone.line, alone.answer, alone.images) == (4, None, ())
    assert alone.where == f"{path} line 4"


def test_samples_are_taken_from_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": str(i)} for i in range(10)), "")
    assert count_samples(path) == 10
    for most, expected in ((1, "0"), (2, "05"), (3, "036"), (10, "0123456789"), (99, "0123456789")):
        assert "".join(sample.prompt for sample in read_samples(path, most=most)) == expected


@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("turns", [True, False])
def test_what_is_held_back_has_every_task_alike(tasks: int, turns: bool) -> None:
    """Files that take turns among tasks, and files sorted by task."""
    for part in PARTS:
        places = part_of(Path("data"), [1] * 480, 240, part)
        task_of = [place % tasks if turns else place * tasks // 480 for place in places]
        counts = [task_of.count(task) for task in range(tasks)]
        assert max(counts) - min(counts) <= 0.2 * len(places) / tasks


@pytest.mark.parametrize(
    ("found", "most", "fitted", "held"),
    [
        (128, None, 64, 64),
        (128, 128, 64, 64),
        (300, 128, 128, 172),
        (1000, 128, 128, 256),
        (2000, None, 1500, 256),
        (400, None, 300, 100),
    ],
)
def test_how_many_are_held_back(found: int, most: int | None, fitted: int, held: int) -> None:
    parts = [part_of(Path("data"), [1] * found, most, part) for part in PARTS]
    assert [len(part) for part in parts] == [fitted, held]
    assert HELD_LEAST <= held <= HELD_MOST
    assert parts == [sorted(part) for part in parts]
    assert not set(parts[0]) & set(parts[1])
    assert scattered(found)[:held] != list(range(held))


def test_batches_are_held_back_whole() -> None:
    sizes = [8, 24, 16, 8] * 8
    fitted, held = (part_of(Path("data"), sizes, 128, part) for part in PARTS)
    assert not set(fitted) & set(held)
    assert 256 <= sum(sizes[place] for place in held) < 256 + 24
    assert 104 < sum(sizes[place] for place in fitted) <= 128


def test_too_few_samples_to_hold_some_back_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": str(i)} for i in range(127)))
    with pytest.raises(InputError, match="holds 127 samples; expected at least 128 where a target"):
        read_samples(path, part="held")
    assert len(read_samples(path)) == 127
    with pytest.raises(InputError, match="no batch is left to fit on when 200 of 200 samples are"):
        part_of(path, [200], None, "fitted")


def test_both_parts_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": str(i)} for i in range(130)), "")
    fitted, held = (
        [sample.prompt for sample in read_samples(path, most=60, part=part)] for part in PARTS
    )
    assert (len(fitted), len(held)) == (60, 70)
    assert len({*fitted, *held}) == 130


def test_lines_in_between_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, "", "no JSON", {"prompt": "b"}, "no JSON")
    assert [sample.line for sample in read_samples(path, most=2)] == [1, 4]
    with pytest.raises(InputError, match="line 3: is not JSON"):
        read_samples(path)


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False))
    assert [sample.prompt for sample in read_samples(path)] == ["a\u2028b"]


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: Expecting property name"),
        ('{"prompt": NaN}', "is not JSON: NaN is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "is not JSON: a key occurs twice"),
        ("[" * 100_000, "is not JSON"),
        ([1], "expected a JSON object; got list"),
        ({}, "expected 'messages' or 'prompt'; got no key"),
        ({"text": "a"}, "expected 'messages' or 'prompt'; got 'text'"),
        ({"prompt": "a", "answer": "b", "answers": ["b"]}, "has 'answer' and 'answers'"),
        ({"prompt": "a", "answers": []}, "'answers' must be a list of at least one string; got []"),
        ({"prompt": "a", "answers": ["b", 3]}, "'answers' must be a list of at least one string"),
        (
            {"prompt": "a", "image": "b"},
            "unknown key 'image'; expected prompt, answer, answers, images",
        ),
        ({"messages": [], "prompt": "a"}, "unknown key 'prompt'; expected messages, answers only"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be a string; got int"),
        ({"prompt": "a", "answer": None}, "'answer' must be a string; got NoneType"),
        ({"prompt": "a", "images": "a.png"}, "'images' must be a list of paths; got str"),
        ({"prompt": "a", "images": [""]}, "an image must be a path; got ''"),
        ({"prompt": "a", "images": ["no.png"]}, "image 'no.png' does not exist; paths are rel"),
        ({"prompt": "a", "images": ["x" * 5000]}, "does not exist"),
        ({"prompt": "a", "images": ["https://a/b.png"]}, "is not a local path; download it"),
        ({"messages": []}, "'messages' must be a list with at least one message"),
        ({"messages": ["hi"]}, "each message must be an object with 'role' and 'content'"),
        ({"messages": [{"content": "hi"}]}, "each message must be an object with 'role'"),
        (user(None), "'content' must be a string or a list of parts"),
        (user([]), "'content' must be a string or a list of parts"),
        (user(["hi"]), "a part of a message must be {'type': 'text'"),
        (user([{"type": "video", "path": "a"}]), "got type 'video'"),
        (user([{"type": "image"}]), "an image part must have one 'path'"),
        (user([{"type": "image", "url": "data:abc"}]), "is not a local path"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, {"prompt": "good"}, line)
    with pytest.raises(InputError) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path} line 2: ")
    assert message in str(error.value)
    assert error.value.exit_code == 65


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 1: is not UTF-8 at byte 12"):
        read_samples(path)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no sample; expected one JSON object a line"):
        read_samples(write(tmp_path, "", " "))
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        read_samples(tmp_path / "none.jsonl")


def test_the_hash_covers_the_used_lines_and_every_image(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    line = {"prompt": "a", "images": ["a.png"]}
    samples = read_samples(write(tmp_path, line, line, {"prompt": "b"}))
    every, head = hash_samples(samples), hash_samples(samples[:2])
    assert every != head
    write(tmp_path, line, line, {"prompt": "c"})
    assert hash_samples(samples[:2]) == head
    assert hash_samples(samples) != every
    picture.write_bytes(b"two")
    assert hash_samples(samples[:2]) != head
    picture.unlink()
    with pytest.raises(InputError, match=r"a\.png: cannot be read: No such file"):
        hash_samples(samples[:2])


def test_several_answers_may_be_right(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    user = [{"role": "user", "content": "hi"}]
    lines = (
        {"prompt": "a", "answers": ["b", "c"]},
        {"prompt": "a", "answer": "b"},
        {"prompt": "a"},
        {"messages": user, "answers": ["b", "c"]},
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_samples(path)
    assert [sample.answers for sample in found] == [("b", "c"), ("b",), (), ("b", "c")]
    assert [sample.answer for sample in found] == ["b", "b", None, None]
