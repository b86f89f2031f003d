"""Calibration data: one JSON object a line, read strictly, with the line in every message.

A line is ``{"messages": [...]}`` in the chat format of transformers, or ``{"prompt": ...,
"answer": ..., "images": [...]}`` for checkpoints without a chat template; ``"answers": [...]`` in
place of ``answer`` where several are right. Paths of images are
relative to the file's folder; nothing is ever fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from tailor_fast._core.errors import InputError

_PROMPT_KEYS = ("prompt", "answer", "answers", "images")
_IMAGE_KEYS = ("path", "url", "image")  # where transformers' chat format holds an image's place
_REMOTE = ("http:", "https:", "ftp:", "data:", "s3:", "gs:", "hf:")

Part = Literal["all", "fitted", "held"]
HELD_LEAST, HELD_MOST = 64, 256  # samples of a file that are held back


@dataclass(frozen=True)
class Sample:
    """One line of a data file.

    Attributes:
        file: the data file.
        line: line in it, counted from 1.
        messages: the chat, in the chat format of transformers; empty in the other form.
        prompt: text before the answer; None in the chat form.
        answer: text that the model is to give; None when the line has none.
        answers: all answers that a line names as right, for evaluation; ``answer`` is the first.
        images: absolute paths, in the order in which the text refers to them.
    """

    file: Path
    line: int
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()

    @property
    def where(self) -> str:
        """File and line, as messages name them."""
        return f"{self.file} line {self.line}"


def count_samples(path: Path) -> int:
    """Count the samples of a data file without reading what they say; blank lines do not count.

    Raises:
        InputError: the file cannot be read or holds no sample.
    """
    found = sum(1 for _, text in _lines(path) if text.strip())
    if not found:
        raise InputError(f"{path}: holds no sample; expected one JSON object a line")
    return found


def read_samples(path: Path, *, most: int | None = None, part: Part = "all") -> list[Sample]:
    """Read a data file; blank lines do not count as samples.

    Args:
        path: JSONL file in UTF-8.
        most: read only so many samples, evenly spaced, because files are often sorted by task; None
            reads all. Lines in between are neither parsed nor kept.
        part: ``all``, or one of the two parts of ``part_of``.

    Returns:
        The samples in the file's order, at least one.

    Raises:
        InputError: the file cannot be read or holds no sample, a line is not one JSON object of one
            of the two forms, or an image is missing; the message names the line.
    """
    found = count_samples(path)
    if part == "all":
        taken = found if most is None else min(most, found)
        wanted = {index * found // taken for index in range(taken)}
    else:
        wanted = set(part_of(path, [1] * found, most, part))
    lines = (line for line in _lines(path) if line[1].strip())
    return [
        _LineReader(path, number).read(text)
        for index, (number, text) in enumerate(lines)
        if index in wanted
    ]


def scattered(count: int) -> list[int]:
    """All places below ``count``, in an order whose every stretch lies evenly among them.

    It is that of the multiples of the golden ratio modulo 1, so that a stretch has its share of a
    file that is sorted by task and of one in which tasks take turns, where even spacing may meet
    one task alone.
    """
    return sorted(range(count), key=lambda place: place * 618_033_989 % 1_000_000_000)


def part_of(path: Path, sizes: Sequence[int], most: int | None, part: Part) -> list[int]:
    """The places of what is fitted on, or of what is held back and shares no sample with it.

    Of a file's samples, those that ``most`` leaves are held back, but at least ``HELD_LEAST`` and
    at most ``HELD_MOST``; without ``most``, a quarter.

    Args:
        path: the file, for messages.
        sizes: samples at each place: 1, or those of a batch.
        most: fit on so many samples at most.
        part: ``fitted`` or ``held``.

    Raises:
        InputError: there are less than twice ``HELD_LEAST`` samples, or batches are too large.
    """
    found = sum(sizes)
    if found < 2 * HELD_LEAST:
        raise InputError(
            f"{path}: holds {found} samples; expected at least {2 * HELD_LEAST} where a target is"
            f" searched for, {HELD_LEAST} to fit on and {HELD_LEAST} to measure on; give more"
        )
    wanted = found * 3 // 4 if most is None else most
    held = min(HELD_MOST, max(HELD_LEAST, found - wanted))
    limit = min(wanted, found - held)
    parts: dict[str, list[int]] = {"held": [], "fitted": []}
    measured = fitted = 0
    for place in scattered(len(sizes)):
        if measured < held:
            parts["held"].append(place)
            measured += sizes[place]
        elif fitted + sizes[place] <= limit:
            parts["fitted"].append(place)
            fitted += sizes[place]
    if not parts["fitted"]:
        raise InputError(
            f"{path}: no batch is left to fit on when {measured} of {found} samples are held back;"
            f" expected one of at most {limit} samples; write smaller batches"
        )
    return sorted(parts[part])


def hash_samples(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 (hex) of what the samples were read from.

    It covers the bytes of each file up to its last sample's line, and of every image once.

    Raises:
        InputError: a file can no longer be read.
    """
    digest = hashlib.sha256()
    last = {sample.file: sample.line for sample in samples}
    for path, line in last.items():
        for number, text in _lines(path):
            if number > line:
                break
            digest.update(text)
    for image in dict.fromkeys(image for sample in samples for image in sample.images):
        try:
            content = image.read_bytes()
        except OSError as error:
            raise InputError(f"{image}: cannot be read: {error.strerror}") from None
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, because str.splitlines would also break at U+2028 inside a JSON string.
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; check the path") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


class _LineReader:
    """Checks one line; every message starts with its place."""

    def __init__(self, path: Path, number: int) -> None:
        self._path = path
        self._number = number

    def read(self, text: bytes) -> Sample:
        body = self._parse(text)
        if not isinstance(body, dict):
            self._fail(f"expected a JSON object; got {type(body).__name__}")
        if "messages" in body:
            self._known_keys(body, ("messages", "answers"))
            messages = self._messages(body["messages"])
            parts = [part for message in messages for part in image_parts(message)]
            images = tuple(Path(part["path"]) for part in parts)
            answers = self._answers(body)
            return Sample(
                self._path, self._number, messages=messages, answers=answers, images=images
            )
        if "prompt" not in body:
            keys = ", ".join(map(repr, body)) or "no key"
            self._fail(f"expected 'messages' or 'prompt'; got {keys}")
        self._known_keys(body, _PROMPT_KEYS)
        answers = self._answers(body)
        return Sample(
            self._path,
            self._number,
            prompt=self._text(body, "prompt"),
            answer=answers[0] if answers else None,
            answers=answers,
            images=self._images(body.get("images", [])),
        )

    def _parse(self, text: bytes) -> Any:
        try:
            return json.loads(
                text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_repeats
            )
        except UnicodeDecodeError as error:
            self._fail(f"is not UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            self._fail(f"is not JSON: {error.msg} at character {error.pos}")
        except (ValueError, RecursionError) as error:
            self._fail(f"is not JSON: {error}")

    def _known_keys(self, body: Mapping[str, Any], known: Sequence[str]) -> None:
        unknown = [key for key in body if key not in known]
        if unknown:
            self._fail(
                f"unknown key {', '.join(map(repr, unknown))}; expected {', '.join(known)} only"
            )

    def _text(self, body: Mapping[str, Any], key: str) -> str:
        value = body[key]
        if not isinstance(value, str):
            self._fail(f"{key!r} must be a string; got {type(value).__name__}")
        if key == "prompt" and not value:
            self._fail("'prompt' is empty; expected text")
        return value

    def _answers(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        if "answer" in body and "answers" in body:
            self._fail("has 'answer' and 'answers'; expected one of them")
        if "answers" not in body:
            return (self._text(body, "answer"),) if "answer" in body else ()
        answers = body["answers"]
        texts = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
        if not texts or not answers:
            self._fail(f"'answers' must be a list of at least one string; got {answers!r:.60}")
        return tuple(answers)

    def _images(self, value: Any) -> tuple[Path, ...]:
        if not isinstance(value, list):
            self._fail(f"'images' must be a list of paths; got {type(value).__name__}")
        return tuple(self._image(entry) for entry in value)

    def _image(self, value: Any) -> Path:
        if not isinstance(value, str) or not value:
            self._fail(f"an image must be a path; got {value!r}")
        if value.lower().startswith(_REMOTE):
            self._fail(f"image {value[:60]!r} is not a local path; download it and give its path")
        path = (self._path.parent / value.removeprefix("file://")).absolute()
        try:
            exists = path.is_file()
        except OSError:  # a name too long for the file system
            exists = False
        if not exists:
            self._fail(f"image {value!r} does not exist; paths are relative to the file's folder")
        return path

    def _messages(self, value: Any) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(value, list) or not value:
            self._fail("'messages' must be a list with at least one message")
        return tuple(self._message(message) for message in value)

    def _message(self, message: Any) -> Mapping[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            self._fail("each message must be an object with 'role' and 'content'")
        content = message.get("content")
        if isinstance(content, str):
            return message
        if not isinstance(content, list) or not content:
            self._fail("a message's 'content' must be a string or a list of parts")
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if kind == "image":
            places = [part[key] for key in _IMAGE_KEYS if key in part]
            if len(places) != 1:
                self._fail("an image part must have one 'path'")
            return {"type": "image", "path": str(self._image(places[0]))}
        return self._fail(
            "a part of a message must be {'type': 'text', 'text': ...} or"
            f" {{'type': 'image', 'path': ...}}; got type {kind!r}"
        )

    def _fail(self, problem: str) -> NoReturn:
        raise InputError(f"{self._path} line {self._number}: {problem}")


def image_parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The image parts of one message, in order."""
    content = message["content"]
    return [part for part in content if part["type"] == "image"] if type(content) is list else []
