"""Progress: lines when piped, a bar on a terminal, nothing when quiet."""

import io

import pytest
from rich.console import Console

from tailor_fast._core.progress import Silent
from tailor_fast.cli.progress import Bar, Lines, shown


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def test_lines_come_every_few_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines.note("finding the input groups")
    clock.now += 60  # does not count: the groups have not begun
    lines.start(100)
    for done in range(1, 101):
        clock.now += 0.5
        lines.group(f"layers.{done}", done, 100, done * 10**8)
    lines.finish()
    text = stream.getvalue()
    printed = text.splitlines()
    assert printed[0] == "finding the input groups"
    assert printed[1] == "10/100 layers.10  2.0/s  0.20 GB/s  ETA 0:00:45"
    assert printed[-1] == "100/100 layers.100  2.0/s  0.20 GB/s  ETA 0:00:00"
    assert len(printed) == 11
    assert text.isascii()
    assert "\x1b" not in text
    assert "\r" not in text


def test_long_runs_say_hours() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines.start(1000)
    clock.now += 10
    lines.group("a", 1, 1000, 0)
    assert "ETA 2:46:30" in stream.getvalue()


def test_a_bar_shows_group_speed_and_time_left() -> None:
    stream, clock = Terminal(), Clock()
    bar = Bar(Console(file=stream, width=120, force_terminal=True), clock)
    bar.start(4)
    clock.now += 2
    bar.group("layers.[0].q_proj", 1, 4, 10**9)
    bar.note("a [note]")
    bar.finish()
    bar.close()
    text = stream.getvalue()
    for part in (
        "layers.[0].q_proj",
        "1/4",
        "0.5/s",
        "0.50 GB/s",
        "ETA 0:00:06",
        "a [note]",
    ):
        assert part in text


def test_the_terminal_is_given_back_when_the_run_fails() -> None:
    stream = Terminal()

    def fail() -> None:
        with shown(False, stream) as progress:
            assert isinstance(progress, Bar)
            progress.start(2)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_what_is_shown_depends_on_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(False, io.StringIO()) as piped, shown(True, Terminal()) as quiet:
        assert isinstance(piped, Lines)
        assert isinstance(quiet, Silent)
    with shown(False) as progress:
        progress.note("to stderr")
    assert capsys.readouterr() == ("", "to stderr\n")


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start(3)
    silent.group("a", 1, 3, 0)
    silent.note("b")
    silent.finish()
    assert capsys.readouterr() == ("", "")
