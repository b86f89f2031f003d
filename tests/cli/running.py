"""Running one command line in this process."""

from typing import NamedTuple

import pytest

from tailor_fast.cli import main


class Ran(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


class CommandLine:
    """Calls ``main`` and returns what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ran:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *self._capsys.readouterr())
