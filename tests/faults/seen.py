"""Whether the shim sees every call by which a run changes its folder: strace, below both, counts.

``python -m tests.faults.seen FOLDER BASE TUNED`` is what is traced: a run that makes OUT and one
that replaces it. It writes what the shim counted.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tailor_fast.cli import main
from tests.faults.harness import CHANGES, Fault, Kind, shim

COUNTED = {
    **dict.fromkeys(("open", "openat"), Kind.OPEN),
    "pwrite64": Kind.WRITE,
    **dict.fromkeys(("fsync", "fdatasync", "sync_file_range"), Kind.SYNC),
    **dict.fromkeys(("rename", "renameat", "renameat2"), Kind.RENAME),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), Kind.UNLINK),
    "mkdir": Kind.MKDIR,
    "fallocate": Kind.ALLOCATE,
    "ftruncate": Kind.TRUNCATE,
    "flock": Kind.LOCK,
    **dict.fromkeys(("chmod", "fchmodat", "fchmodat2"), Kind.MODE),
}
UNCHANGING = {
    *("stat", "lstat", "fstat", "newfstatat", "statx", "statfs", "fstatfs", "access", "faccessat"),
    *("faccessat2", "readlink", "readlinkat", "getdents64", "getcwd", "getxattr", "lgetxattr"),
    *("read", "pread64", "preadv", "preadv2", "lseek", "close", "fadvise64", "fcntl", "ioctl"),
}
_CALL = re.compile(r"\d+ +(\w+)\((.*)")
_LISTING = "O_RDONLY|O_NONBLOCK|O_CLOEXEC|O_DIRECTORY"  # how the C library opens to list names


def compare(root: Path, base: Path, tuned: Path) -> dict[str, int] | None:
    """Trace a run; what strace and the shim counted must be equal, kind by kind.

    Returns:
        How many calls of each kind; None where nothing can be traced.
    """
    strace, folder, log = shutil.which("strace"), root / "seen", root / "strace.txt"
    if strace is None or subprocess.run([strace, "-qq", "-o", log, "true"], check=False).returncode:
        return None
    folder.mkdir()
    job = [sys.executable, "-m", "tests.faults.seen", *map(str, (folder, base, tuned))]
    command = [strace, "-f", "-y", "-qq", "-o", str(log), *job]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout.splitlines()[-1])
    traced = Counter(
        kind.name
        for line in log.read_text(errors="replace").splitlines()
        if (kind := _change(line, str(folder))) is not None
    )
    assert traced == Counter(counted), f"strace {dict(traced)}, shim {counted}"
    shutil.rmtree(folder)
    return counted


def _change(line: str, folder: str) -> Kind | None:
    """The kind of a traced call that changes ``folder``."""
    match = _CALL.match(line)
    if match is None or folder not in match[2] or match[1] in ("execve", *UNCHANGING):
        return None
    name, arguments = match[1], match[2]
    if name == "mmap" and not ("MAP_SHARED" in arguments and "PROT_WRITE" in arguments):
        return None
    assert name in COUNTED, f"the shim does not know: {line}"
    return None if _LISTING in arguments else COUNTED[name]


def _traced(folder: str, base: str, tuned: str) -> int:
    Fault().arm(Path(folder))
    patch = ["patch", base, tuned, "-o", f"{folder}/out", "-q", "--out-shard-size", "60000"]
    code = main(patch) or main([*patch, "--density", "0.2", "--overwrite"])
    counts = {kind.name: shim().shim_calls_of(kind) for kind in CHANGES}
    sys.stdout.write(json.dumps({name: count for name, count in counts.items() if count}) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(_traced(*sys.argv[1:]))
