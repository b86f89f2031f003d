"""A run with ``--save-patch``: two outputs, of which the patch file comes second."""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from tailor_fast.cli import main
from tests.faults.harness import Ended, Lab, digest, start, wait

WITHOUT_PATCH = "complete but for its patch"


@dataclass
class SavedLab(Lab):
    """Trials whose ``arguments`` have ``PATCH`` for the patch file.

    A run that is killed between its outputs leaves a whole OUT and no patch. The same command then
    refuses, because OUT exists, and says which command writes the patch: that one is run too.

    Attributes:
        golden_patch: the patch file's bytes.
    """

    golden_patch: bytes = b""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.golden_patch = self.patch.read_bytes()

    @property
    def patch(self) -> Path:
        return self.folder / "patch.safetensors"

    def work(self, *more: str) -> int:
        given = {"OUT": str(self.out), "PATCH": str(self.patch)}
        return main([*(given.get(word, word) for word in self.arguments), "-q", *more])

    def state(self) -> str:
        """``absent``, ``complete``, or ``WITHOUT_PATCH``; anything else is an error."""
        found = super().state()
        if found == "absent":
            assert not self.patch.exists(), "a patch file of an output that is not there"
            return found
        if not self.patch.exists():
            return WITHOUT_PATCH
        assert self.patch.read_bytes() == self.golden_patch, "half a patch file"
        return found

    def recover(self) -> str:
        state = self.state()
        if state == WITHOUT_PATCH:
            self._finish()
        elif state == "absent":
            ended = self.run()
            assert ended.code == 0, ended.said
        elif self.leftovers():
            self.run()
        assert self.state() == "complete"
        assert self.leftovers() == [], self.leftovers()
        assert digest(self.inputs) == self.before, "an input changed"
        self.counts[state] = self.counts.get(state, 0) + 1
        return state

    def _finish(self) -> None:
        refused = self.run()
        assert refused.code == 73, refused
        told = re.search("run `tailor-fast ([^`]+)`", refused.said)
        assert told is not None, refused.said
        ended = self._run_command([*shlex.split(told[1]), "-q"])
        assert ended.code == 0, ended.said

    def _run_command(self, command: list[str]) -> Ended:
        began = time.monotonic()
        return wait(start(lambda: main(command), self.said, None, self.folder), self.said, began)

    def leftovers(self) -> list[str]:
        return [name for name in super().leftovers() if name != self.patch.name]
