"""The larger variant: its scenes say what is seen, its bench is the small one's on a device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.cells import from_line, read
from benchmarks.quality.large import __main__ as command
from benchmarks.quality.large import scenes, training
from benchmarks.quality.large.bench import LargeBench
from benchmarks.quality.large.model import IDS, IMAGE_TOKENS, WORDS, Size, encode, family_of
from benchmarks.quality.scenes import LETTERS, OLD_TASKS, digits
from benchmarks.quality.tinyllava import IMAGE, Batch
from tailor_fast import Recipe

CPU = torch.device("cpu")
TASKS = (*OLD_TASKS, *scenes.NEW_TASKS)


def seen(scene: np.ndarray) -> list[int]:
    """The labels of a scene's sixteen digits, found by their pixels."""
    pool, labels = digits("test")
    tiles = scene.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 8, 8)
    return [int(labels[(pool == tile).all((1, 2)).argmax()]) for tile in tiles]


def answer(task: str, argument: str, row: list[int]) -> str:
    """What is right, by the words of the tasks."""
    if task == "list":
        return " ".join(map(str, row))
    if task == "exists":
        return "yes" if int(argument) in row else "no"
    if task == "larger":
        left, right = row[4 * int(argument)], row[4 * int(argument) + 3]
        return "same" if left == right else "left" if left > right else "right"
    digit = row[int(argument.removeprefix("p"))]
    return {
        "what": str(digit),
        "parity": ("even", "odd")[digit % 2],
        "code": LETTERS[digit],
        "next": str((digit + 3) % 10),
    }[task]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_the_digits_that_are_seen(task: str) -> None:
    drawn = scenes.draw(task, "test", 40, 7)
    assert drawn.images.shape == (40, 32, 32)
    images = 255 - drawn.images if task == "code" else drawn.images
    for image, prompt, said in zip(images, drawn.prompts, drawn.answers, strict=True):
        name, argument = prompt.split()
        assert name == task
        assert said == answer(task, argument, seen(image))
    assert len(set(drawn.answers)) > 1
    again = scenes.draw(task, "test", 40, 7)
    assert (drawn.images == again.images).all()
    assert drawn.prompts == again.prompts


def test_digits_exist_in_half_of_the_scenes() -> None:
    answers = scenes.draw("exists", "train", 400, 0).answers
    assert 150 < answers.count("yes") < 250


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task must be one of what, parity"):
        scenes.draw("twice", "test", 1, 0)


def test_inputs_are_the_words_and_the_scene() -> None:
    drawn = scenes.draw("list", "test", 3, 0)
    batch = encode([drawn], CPU)
    assert batch.pixel_values.shape == (3, 3, 32, 32)
    assert batch.input_ids.shape == (3, 1 + IMAGE_TOKENS + 2)
    assert (batch.input_ids == IMAGE).sum() == 3 * IMAGE_TOKENS
    assert batch.answer_ids.shape == (3, 17)
    words = [WORDS[index] for index in batch.answer_ids[0, :-1]]
    assert " ".join(words) == drawn.answers[0]
    assert len(IDS) == len(WORDS) <= 64


def test_scenes_are_shifted_by_a_pixel_at_most() -> None:
    batch = encode([scenes.draw("what", "train", 64, 0)], CPU)
    moved = training.augmented(batch, 0.0, torch.Generator().manual_seed(0)).pixel_values
    plain = batch.pixel_values
    found = set()
    for scene in range(64):
        hits = [
            (down, right)
            for down in range(3)
            for right in range(3)
            if torch.equal(moved[scene, :, 1:-1, 1:-1], _window(plain[scene], down, right))
        ]
        assert hits
        found.update(hits)
    assert len(found) == 9
    noisy = training.augmented(batch, 0.135, torch.Generator().manual_seed(0)).pixel_values
    assert (noisy - moved).std() == pytest.approx(0.135, rel=0.02)
    assert (noisy[:, 0] == noisy[:, 2]).all()


def _window(scene: torch.Tensor, down: int, right: int) -> torch.Tensor:
    return scene[:, down : down + 30, right : right + 30]


def test_the_large_model_has_forty_million_parameters() -> None:
    with torch.device("meta"):
        model = family_of(Size()).new_model(0)
    assert 38e6 < sum(one.numel() for one in model.parameters()) < 43e6


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> LargeBench:
    protocol = command.protocols("dry-run", CPU)["dry-run-next"]
    work = tmp_path_factory.mktemp("large")
    base, tuned = protocol.make(work, 0, 1, lambda _line: None)
    assert protocol.make(work, 0, 1, lambda _line: None) == (base, tuned)  # found again
    return LargeBench(protocol, base, tuned, 1)


def test_the_bench_tailors_and_asks(bench: LargeBench) -> None:
    assert len(bench.names) == 9  # one block's seven linears, two of the projector
    state = bench.tailor(Recipe(density=0.1), retain=True)
    result = bench.measure(lambda: state, "validation")
    assert result.changed == pytest.approx(0.1, abs=0.01)
    assert set(result.scores.old) == set(OLD_TASKS)
    assert set(bench.input_norms()) == set(bench.fisher()) == set(bench.names)


def test_a_right_model_is_told_from_a_wrong_one(
    bench: LargeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(_model: object, batch: Batch) -> torch.Tensor:
        return batch.answer_ids[:, 0] == IDS["yes"]  # as if it said nothing else

    monkeypatch.setattr(type(bench.family), "right", lambda _self, *args: right(*args))
    scores = bench.scores(bench.states[0], "test")
    assert 40 < scores.old["exists"] < 60
    assert scores.old["what"] == scores.new == 0


def test_the_command_writes_a_table_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    asked = ["--variant", "dry-run", "--device", "cpu", "--finetuning-seeds", "0"]
    asked += ["--rows", "base", "tuned", "default", "--work", str(tmp_path), "--out", str(table)]
    command.main(asked)
    cells = [from_line(line) for line in read(table)]
    assert [(cell.key.protocol, cell.key.row) for cell in cells] == [
        (f"dry-run-{task}", row)
        for task in ("code", "next")
        for row in ("base", "tuned", "default")
    ]
    first = table.read_text().splitlines()[0]
    assert first.startswith("# python -m benchmarks.quality.large --variant dry-run --device cpu ")
    assert "; cpu; commit " in first
    kept = (tmp_path / "dry-run-cells.csv").read_bytes()
    command.main(asked)
    assert (tmp_path / "dry-run-cells.csv").read_bytes() == kept
    assert "dry-run-next  default" in capsys.readouterr().out


def test_without_a_card_it_says_what_can_be_tried(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit):
        command.main([])
    assert "--variant dry-run --device cpu tries every step" in capsys.readouterr().err
