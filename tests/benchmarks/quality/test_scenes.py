"""Scenes show the digits of their split, and answers are what the digits say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.quality import scenes
from benchmarks.quality.scenes import LATER_TASKS, NEW_TASKS, OLD_TASKS
from tailor_fast.models.samples import read_samples

TASKS = (*OLD_TASKS, *NEW_TASKS, *LATER_TASKS)
SPLITS = ("train", "validation", "test")
COUNT = 60


def _known() -> dict[bytes, tuple[str, int]]:
    """Split and label of every digit image, by its bytes."""
    known = {}
    for split in SPLITS:
        images, labels = scenes.digits(split)
        for image, label in zip(images, labels, strict=True):
            known[image.tobytes()] = (split, int(label))
    return known


def _tile(image: np.ndarray, position: int) -> np.ndarray:
    row, column = 8 * (position // 2), 8 * (position % 2)
    return np.ascontiguousarray(image[row : row + 8, column : column + 8])


def _expected(task: str, argument: str, shown: list[int]) -> str:
    if task == "list":
        return " ".join(map(str, shown))
    number = int(argument)
    if task == "exists":
        return "yes" if number in shown else "no"
    if task == "larger":
        left, right = shown[2 * number : 2 * number + 2]
        return "left" if left > right else "right" if right > left else "same"
    digit = shown[number]
    return {
        "what": str(digit),
        "parity": "even" if digit in (0, 2, 4, 6, 8) else "odd",
        "code": scenes.LETTERS[digit],
        "next": "3456789012"[digit],
        "twice": "0246802468"[digit],
        "mirror": scenes.LETTERS[::-1][digit],
    }[task]


def test_the_splits_divide_the_digits() -> None:
    data = load_digits()
    parts = [scenes.digits(split) for split in SPLITS]
    assert [len(labels) for _, labels in parts] == [1097, 200, 500]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    rows = sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    every = np.rint(data.images * 255 / 16).astype(np.uint8)
    assert rows == sorted(
        (image.tobytes(), int(label)) for image, label in zip(every, data.target, strict=True)
    )
    assert len(_known()) == 1797  # no image stands in two splits


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_digits_are_right(task: str, split: scenes.Split) -> None:
    known = _known()
    drawn = scenes.draw(task, split, COUNT, seed=1)
    assert len(drawn) == COUNT
    for image, prompt, answer in zip(drawn.images, drawn.prompts, drawn.answers, strict=True):
        shown = 255 - image if task == "code" else image
        shown = shown[:, ::-1] if task == "mirror" else shown
        found = [known[_tile(shown, position).tobytes()] for position in range(4)]
        assert {where for where, _ in found} == {split}
        name, argument = prompt.split()
        assert name == task
        assert answer == _expected(task, argument, [label for _, label in found])


@pytest.mark.parametrize("task", TASKS)
def test_every_argument_is_asked(task: str) -> None:
    arguments = {prompt.split()[1] for prompt in scenes.draw(task, "train", 300, 0).prompts}
    expected = {"larger": {"0", "1"}, "list": {"all"}, "exists": set("0123456789")}
    assert arguments == expected.get(task, set("0123"))


def test_exists_is_balanced() -> None:
    answers = scenes.draw("exists", "test", 1000, 0).answers
    assert abs(answers.count("yes") - 500) < 80  # five standard deviations


def test_the_seed_decides() -> None:
    first, again, other = (scenes.draw("what", "train", 20, seed) for seed in (4, 4, 5))
    assert np.array_equal(first.images, again.images)
    assert (first.prompts, first.answers) == (again.prompts, again.answers)
    assert not np.array_equal(first.images, other.images)
    assert not np.array_equal(first.images, scenes.draw("next", "train", 20, 4).images)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"draw: task must be one of what, .*, mirror; got 'sum'"):
        scenes.draw("sum", "train", 1, 0)


def test_files_hold_the_scenes_in_turns(tmp_path: Path) -> None:
    parts = [scenes.draw("what", "train", 2, 0), scenes.draw("list", "train", 3, 0)]
    path = tmp_path / "old.jsonl"
    scenes.write(parts, path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]
    assert len(lines) == len(order)
    for line, (part, row) in zip(lines, order, strict=True):
        assert line["prompt"] == f"<image> {parts[part].prompts[row]}"
        assert line["answer"] == parts[part].answers[row]
        image = np.asarray(Image.open(tmp_path / line["images"][0]))
        assert np.array_equal(image, parts[part].images[row])


def test_the_product_reads_the_files(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    drawn = scenes.draw("code", "train", 3, 0)
    scenes.write([drawn], path)
    samples = read_samples(path)
    assert [sample.answer for sample in samples] == drawn.answers
    assert [sample.images[0].name for sample in samples] == [f"new-0000{i}.png" for i in range(3)]
