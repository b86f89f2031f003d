"""Judge 100,000 changed headers, or as many as are asked for, and a tenth as many indexes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.checkpoint.fuzz_header import Target
from tests.checkpoint.hostile.mutants import INDEX_SEEDS, SEEDS, mutants
from tests.checkpoint.hostile.oracle import BOTH, memory_file

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

with TemporaryDirectory() as folder, memory_file() as file:
    target = Target(Path(folder), file)
    for kind, seeds in (("files", SEEDS), ("indexes", INDEX_SEEDS)):
        count = COUNT if kind == "files" else COUNT // 10
        found = Counter(target(blob) for blob in mutants(count, seeds))
        verdicts = ", ".join(f"{verdict} {number}" for verdict, number in sorted(found.items()))
        sys.stdout.write(f"{count} {kind}: {verdicts}\n")
        assert found[BOTH]
