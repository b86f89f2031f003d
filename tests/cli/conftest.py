import pytest

from tests.cli.running import CommandLine


@pytest.fixture
def tailor_fast(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The program, as a function of its arguments."""
    return CommandLine(capsys)
