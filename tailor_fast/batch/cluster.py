"""Jobs on the workers of a Ray cluster: who runs where, and what is lost with a machine, is Ray's.

Every worker runs whole jobs and nothing else; the tables are written by the process that asked.
Inputs and outputs must be at the same paths on all machines, as on a shared file system.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tailor_fast._core.closing import Closing
from tailor_fast._core.env import report_no_usage_to_ray
from tailor_fast._core.errors import UsageError
from tailor_fast.batch.manifest import JobSpec
from tailor_fast.batch.state import JobState

RETRIES = 3  # of a job whose worker or machine is lost
_ANSWER_SECONDS = 5.0
_CLEAN_UP_SECONDS = 30.0
_LOST = 1

Work = Callable[[JobSpec, bool], JobState]


class Cluster(Closing):
    """A connection to Ray.

    Args:
        address: of a cluster that is running, ``HOST:PORT`` or ``auto`` for this machine's; or
            ``local`` to start one of this machine alone, for its several cards.
        cpus: cores that a job is given; torch uses as many threads.

    Raises:
        UsageError: Ray is not installed, or does not answer.
    """

    def __init__(self, address: str, *, cpus: int = 1) -> None:
        """Connect."""
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise UsageError(
                "--ray needs the package ray; install it with pip install 'tailor_fast[ray]'"
            ) from None
        report_no_usage_to_ray()
        alone = {"include_dashboard": False} if address == "local" else {}
        try:
            _knock(address)
            with _own_handler_of_sigterm():
                ray.init(address=address, logging_level="ERROR", log_to_driver=False, **alone)
        except (OSError, ValueError, RuntimeError) as error:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UsageError(
                f"--ray {address}: no cluster answers there ({told}); start one with `ray start"
                " --head`, or give `local`"
            ) from None
        self._ray = ray
        self._cpus = cpus

    def close(self) -> None:
        """Disconnect; a cluster that was started here ends."""
        self._ray.shutdown()

    def results(
        self, jobs: Sequence[JobSpec], work: Work, *, overwrite: bool
    ) -> Generator[tuple[JobSpec, JobState]]:
        """Run all jobs and yield each when it is done; closing the iterator stops the rest.

        A job that reads what an earlier one writes waits for it. A job is given one card where its
        device is ``cuda``. One whose worker is lost is begun again, ``RETRIES`` times.

        Args:
            jobs: none of them may name a card by number.
            work: a module's function, which the workers import.
            overwrite: for ``work``.
        """
        waiting: dict[Any, JobSpec] = {}
        try:
            for job in jobs:
                before = [ref for ref, other in waiting.items() if _reads(job, other.out)]
                waiting[self._start(job, work, overwrite, before)] = job
            while waiting:
                (done,), _ = self._ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(done)
                yield job, self._state(job, done)
        finally:
            self._stop(list(waiting))

    def _start(self, job: JobSpec, work: Work, overwrite: bool, before: Sequence[Any]) -> Any:
        task = self._ray.remote(_run).options(
            name=f"tailor_fast {job.label}",
            num_cpus=self._cpus,
            num_gpus=int(job.device == "cuda"),
            max_retries=RETRIES,
        )
        # A reference that is an argument is waited for.
        return task.remote(work, job, overwrite, *before)

    def _state(self, job: JobSpec, done: Any) -> JobState:
        try:
            state: JobState = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            problem = f"lost with its worker {RETRIES + 1} times ({told})"
            return JobState(job.label, str(job.out), "failed", error=problem, exit_code=_LOST)
        return state

    def _stop(self, running: Sequence[Any]) -> None:
        """Interrupt what runs, so that each worker removes what it had begun to write."""
        for ref in running:
            self._ray.cancel(ref, force=False)
        if running:
            self._ray.wait(list(running), num_returns=len(running), timeout=_CLEAN_UP_SECONDS)


def _knock(address: str) -> None:
    """Raise ``OSError`` where nobody listens: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()


@contextmanager
def _own_handler_of_sigterm() -> Iterator[None]:
    """Ray ends the process at once on SIGTERM; ours cleans up first."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where neither Ray nor anybody else may set a handler
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def check_devices(jobs: Sequence[JobSpec]) -> None:
    """Raise ``UsageError`` for a job that names a card by number: Ray gives the cards out."""
    for job in jobs:
        if job.device.startswith("cuda:"):
            raise UsageError(
                f"job {job.label}: device {job.device} names a card; expected cuda: on a cluster"
                " each job is given a free one"
            )


def _reads(job: JobSpec, out: Path) -> bool:
    given = (job.base, job.tuned, job.calibration, job.statistics, job.retain)
    whole = out.resolve()
    return any(path is not None and path.resolve().is_relative_to(whole) for path in given)


def _run(work: Work, job: JobSpec, overwrite: bool, *_before: JobState) -> JobState:
    return work(job, overwrite)
