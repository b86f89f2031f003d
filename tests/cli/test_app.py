"""The program as a whole: help, usage errors, exit codes, and what it imports."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tailor_fast import __version__
from tailor_fast._core import errors
from tailor_fast.patching import inspecting
from tests.cli.running import CommandLine

COMMANDS = (
    *("patch", "plan", "batch", "stitch", "calibrate", "evaluate"),
    *("inspect", "verify", "backends", "bench"),
)
HEAVY = ("torch", "transformers", "pydantic", "matplotlib", "yaml", "numpy", "safetensors")


def raising(error: BaseException) -> Callable[[Path], None]:
    def fail(_path: Path) -> None:
        raise error

    return fail


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from tailor_fast.cli import main; code = main(['--help']);"
        f" print(code, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ")]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


def test_the_module_is_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tailor_fast"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"tailor-fast {__version__}\n"
    missing = subprocess.run(
        [*command, "inspect", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 65
    assert missing.stdout == ""
    assert (
        missing.stderr == f"tailor-fast: error: {tmp_path}/none: does not exist; check the path\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tailor_fast: CommandLine, command: str) -> None:
    ran = tailor_fast(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: tailor-fast {command} " in ran.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frob"], "No such command 'frob'; see `tailor-fast --help`"),
        (["patch", "a"], "Missing argument 'TUNED'; see `tailor-fast patch --help`"),
        (["patch", "a", "b"], "Missing option '-o' / '--out'; see `tailor-fast patch --help`"),
        (["verify", "a", "--zz"], "No such option: --zz; see `tailor-fast verify --help`"),
        (["plan", "a", "b", "-o", "c", "--density", "x"], "Invalid value for '--density'"),
        (["patch", "a", "b", "-o", "c", "--samples", "0"], "Invalid value for '--samples'"),
        (["calibrate", "a", "--data", "b", "-o", "c", "--kind", "x"], "value for '--kind'"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tailor_fast: CommandLine, arguments: list[str], sentence: str
) -> None:
    ran = tailor_fast(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("tailor-fast: error: ")
    assert sentence in ran.err
    assert ran.err.count("\n") == 1


def test_no_command_prints_the_help(tailor_fast: CommandLine) -> None:
    ran = tailor_fast()
    assert (ran.code, ran.err) == (2, "")
    assert "Usage: tailor-fast " in ran.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TailorError("why"), 1),
        (errors.UsageError("why"), 2),
        (errors.InputError("why"), 65),
        (errors.OutputError("why"), 73),
        (errors.StorageError("why"), 74),
        (errors.StoppedError("why"), 75),
    ],
)
def test_an_error_is_its_sentence_and_its_exit_code(
    tailor_fast: CommandLine, monkeypatch: pytest.MonkeyPatch, error: errors.TailorError, code: int
) -> None:
    monkeypatch.setattr(inspecting, "inspect_path", raising(error))
    ran = tailor_fast("inspect", "a")
    assert ran == (code, "", "tailor-fast: error: why\n")
    ran = tailor_fast("inspect", "a", "-v")
    assert ran.code == code
    assert ran.err.startswith("Traceback (most recent call last)")
    assert ran.err.endswith("tailor-fast: error: why\n")


def test_an_unexpected_error_is_one_sentence_too(
    tailor_fast: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "inspect_path", raising(RuntimeError("two\nlines")))
    ran = tailor_fast("inspect", "a")
    assert ran == (
        1,
        "",
        "tailor-fast: error: unexpected RuntimeError: two lines; run again with -v to see where\n",
    )
    ran = tailor_fast("inspect", "a", "-v")
    assert ran.err.endswith("tailor-fast: error: unexpected RuntimeError: two lines\n")


def test_an_interrupt_is_130(tailor_fast: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "inspect_path", raising(KeyboardInterrupt()))
    ran = tailor_fast("inspect", "a")
    assert ran == (130, "", "tailor-fast: error: stopped by the user; nothing was written\n")


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGTERM, 143, "terminated; nothing was written"),
        (signal.SIGINT, 130, "stopped by the user; nothing was written"),
    ],
)
def test_a_stop_that_another_error_replaces(
    tailor_fast: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    sentence: str,
) -> None:
    """A library's clean-up that the signal cut short may fail in its turn."""

    def inspected(*_: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            raise UnboundLocalError("half set up")

    before = signal.getsignal(number)
    monkeypatch.setattr(inspecting, "inspect_path", inspected)
    assert tailor_fast("inspect", "a") == (code, "", f"tailor-fast: error: {sentence}\n")
    assert signal.getsignal(number) is before
