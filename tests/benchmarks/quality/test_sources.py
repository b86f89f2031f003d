"""A digest of code is one of what the code does."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.quality import sources

SOURCE = '"""A module."""\n\n\ndef twice(x):\n    """Twice."""\n    return 2 * x\n'


def _module(folder: Path, text: str) -> ModuleType:
    path = folder / f"m{abs(hash(text))}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A module.", "Another word."),
        ("Twice.", "Two times."),
        ("return 2 * x", "return (2 * x)  # why"),
        ('    """Twice."""\n', ""),
    ],
)
def test_words_and_layout_do_not_change_it(tmp_path: Path, old: str, new: str) -> None:
    before, after = (_module(tmp_path, text) for text in (SOURCE, SOURCE.replace(old, new)))
    assert sources.digest([before]) == sources.digest([after])


@pytest.mark.parametrize(("old", "new"), [("2 * x", "3 * x"), ("twice", "thrice")])
def test_code_does(tmp_path: Path, old: str, new: str) -> None:
    before, after = (_module(tmp_path, text) for text in (SOURCE, SOURCE.replace(old, new)))
    assert sources.digest([before]) != sources.digest([after])
    assert sources.digest([before, after]) != sources.digest([after, before])
