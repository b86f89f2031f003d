"""How many bytes of tensors were read from which files."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from tailor_fast.checkpoint import reader


class ReadBytes:
    """Counts while ``monkeypatch`` lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._counts: Counter[Path] = Counter()
        self._lock = threading.Lock()
        real = reader.read_exact

        def counted(fd, view, offset, path, tensor=None) -> None:
            real(fd, view, offset, path, tensor)
            if tensor is not None:
                with self._lock:
                    self._counts[Path(path).resolve()] += len(view)

        monkeypatch.setattr(reader, "read_exact", counted)

    def of(self, place: Path) -> int:
        """Bytes of a file, or of all files in a folder, since the last ``clear``."""
        whole = place.resolve()
        return sum(n for path, n in self._counts.items() if path.is_relative_to(whole))

    def clear(self) -> None:
        """Count from zero."""
        self._counts.clear()
