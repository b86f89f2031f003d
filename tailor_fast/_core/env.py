"""The only reader of environment variables, and the only writer.

Each is read once, at start-up of the part that it concerns, and never inside an op.
"""

import os
from typing import NamedTuple

TRITON_INTERPRET = "TRITON_INTERPRET"


def triton_interpreted() -> bool:
    """Whether Triton kernels run under its CPU interpreter (set before the first import)."""
    return os.environ.get(TRITON_INTERPRET, "0") == "1"


def report_no_usage_to_ray() -> None:
    """Keep a Ray that is started here from reporting its use, unless the user has told it to.

    Ray has no other switch for one process. Read when Ray starts.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class Launch(NamedTuple):
    """What a launcher such as torchrun says about a process.

    Attributes:
        rank: its number among all.
        local_rank: its number among those of its machine.
        processes: how many there are.
        by_torchrun: whether a launcher started several processes on this machine.
    """

    rank: int
    local_rank: int
    processes: int
    by_torchrun: bool


def launch() -> Launch:
    """How this process was started. Read when a command starts."""
    rank, local_rank, count = (
        os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if not (rank.isdecimal() and count.isdecimal()):
        return Launch(0, 0, 1, by_torchrun=False)
    local = int(local_rank) if local_rank.isdecimal() else 0
    return Launch(int(rank), local, int(count), by_torchrun=local_rank.isdecimal())
