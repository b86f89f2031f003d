"""Coverage-guided fuzzing of the header and the index, against the format's library and ``json``.

    pip install 'tailor_fast[fuzz]'
    python -m tests.checkpoint.fuzz_header CORPUS -max_total_time=600 -max_len=4096

CORPUS is a folder that keeps what reached new code; it is filled with good files when it is empty.
Text that begins with a brace is read as an index, everything else as a file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType

from tailor_fast.checkpoint import foreign, header, index, reader, strict_json
from tailor_fast.checkpoint.index import INDEX_NAME
from tests.checkpoint.hostile.mutants import INDEX_SEEDS, SEEDS
from tests.checkpoint.hostile.oracle import judge_file, judge_index, memory_file

SHARDS = ("a.safetensors", "b.safetensors")


class Target:
    """Judges one input after the other: files in ``file``, indexes in ``folder``."""

    def __init__(self, folder: Path, file: Path) -> None:
        self._file = file
        self._directory = folder / "sharded"
        self._directory.mkdir()
        (self._directory / INDEX_NAME).symlink_to(file)
        for name in SHARDS:  # an index is accepted only where its files are
            (self._directory / name).touch()

    def __call__(self, data: bytes) -> str:
        """Raise ``AssertionError`` when the readers disagree; return who accepts ``data``."""
        if data[:1] == b"{":
            return judge_index(data, self._directory)
        return judge_file(data, self._file)


def main() -> None:
    """Run libFuzzer with the arguments of the command line."""
    import atheris

    corpus = next((Path(word) for word in sys.argv[1:] if not word.startswith("-")), None)
    if corpus is not None and not any(corpus.iterdir()):
        for number, seed in enumerate([*SEEDS, *INDEX_SEEDS]):
            (corpus / f"seed-{number}").write_bytes(seed)
    for module in (strict_json, header, foreign, index, reader):
        for value in vars(module).values():
            if getattr(value, "__module__", "") == module.__name__:
                members = vars(value).values() if isinstance(value, type) else ()
                for function in (value, *members):
                    if isinstance(function, FunctionType):
                        atheris.instrument_func(function)
    with TemporaryDirectory() as folder, memory_file() as file:
        target = Target(Path(folder), file)
        atheris.Setup(sys.argv, lambda data: target(data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
