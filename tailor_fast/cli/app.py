"""The commands put together, and what becomes of every error: one sentence and an exit code."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, get_annotations
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from tailor_fast._core.env import launch
from tailor_fast._core.errors import PeerError, StoppedError, TailorError
from tailor_fast._version import __version__
from tailor_fast.cli.apply import ApplyOptions, apply
from tailor_fast.cli.backends import BackendsOptions, backends
from tailor_fast.cli.batch import BatchCommandOptions, batch
from tailor_fast.cli.bench import BenchOptions, bench
from tailor_fast.cli.calibrate import CalibrateOptions, calibrate
from tailor_fast.cli.diff import DiffOptions, diff
from tailor_fast.cli.evaluate import EvaluateOptions, evaluate
from tailor_fast.cli.inspect import InspectOptions, inspect
from tailor_fast.cli.options import Options
from tailor_fast.cli.patch import PatchOptions, patch
from tailor_fast.cli.plan import PlanOptions, plan
from tailor_fast.cli.revert import RevertOptions, revert
from tailor_fast.cli.stitch import StitchOptions, stitch
from tailor_fast.cli.verify import VerifyOptions, verify

PROGRAM = "tailor-fast"
USAGE = 2
STOPPED_BY_USER = 130
TERMINATED = 143
_SHARED = ("patch", "calibrate")  # that several processes can do together
_STOPS = (signal.SIGINT, signal.SIGTERM)

OptionsT = TypeVar("OptionsT", bound=Options)
Run = Callable[[OptionsT], int | None]

# typer's errors of usage, whether they are click's own or those of the copy inside typer.
_UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def run(arguments: Sequence[str] | None) -> int:
    """Run one command line; see ``tailor_fast.cli.main``."""
    try:
        code = _app()(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except _UsageError as error:
        _complain_of_usage(error)
        return USAGE
    return int(code or 0)


def _app() -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    _add(app, PatchOptions, patch)
    _add(app, PlanOptions, plan)
    _add(app, BatchCommandOptions, batch)
    _add(app, StitchOptions, stitch)
    _add(app, CalibrateOptions, calibrate)
    _add(app, EvaluateOptions, evaluate)
    _add(app, DiffOptions, diff)
    _add(app, ApplyOptions, apply)
    _add(app, RevertOptions, revert)
    _add(app, InspectOptions, inspect)
    _add(app, VerifyOptions, verify)
    _add(app, BackendsOptions, backends)
    _add(app, BenchOptions, bench)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Model Tailor: repair a fine-tuned model's forgetting by a sparse patch on the base model."""


def _add(app: typer.Typer, kind: type[OptionsT], run_command: Run[OptionsT]) -> None:
    """Add a command whose options are the fields of a dataclass."""

    def command(**values: Any) -> None:
        options = kind(**values)
        _refuse_several(run_command.__name__)
        raise typer.Exit(_guarded(lambda: run_command(options), verbose=options.verbose))

    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(kind)}
    # A command's own options before those that it shares with others.
    names = list(dict.fromkeys(name for part in kind.__mro__ for name in get_annotations(part)))
    command.__signature__ = Signature(  # type: ignore[attr-defined]  # what typer reads
        [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if defaults[name] is MISSING else defaults[name],
                annotation=hints[name],
            )
            for name in names
        ]
    )
    command.__annotations__ = {name: hints[name] for name in names}
    app.command(run_command.__name__, help=run_command.__doc__)(command)


def _refuse_several(name: str) -> None:
    """A command that several processes cannot share is not run by each of them."""
    start = launch()
    if start.processes > 1 and start.by_torchrun and name not in _SHARED:
        if start.rank == 0:
            _complain(
                f"{name} is the work of one process; got {start.processes}; start it without"
                " torchrun"
            )
        raise typer.Exit(USAGE)


def _guarded(run_command: Callable[[], int | None], *, verbose: bool) -> int:
    """Run a command; an error becomes its sentence on stderr and its exit code."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("tailor_fast").setLevel(logging.DEBUG)
    stops = _Stops()
    try:
        with stops.raised():
            return run_command() or 0
    except BaseException as error:
        # Whatever arrives after a signal comes of it: a library's own clean-up, cut short, may have
        # put its error in the place of ours.
        if isinstance(error, PeerError):
            return error.exit_code  # that process says why
        if isinstance(error, StoppedError):
            return _failed(error, verbose=verbose)
        if stops.number is not None and _notes(error):
            _complain(f"stopped; {_notes(error)}")
            return StoppedError.exit_code
        if stops.number == signal.SIGTERM:
            _complain("terminated; nothing was written")
            return TERMINATED
        if stops.number == signal.SIGINT or isinstance(error, KeyboardInterrupt):
            _complain("stopped by the user; nothing was written")
            return STOPPED_BY_USER
        if not isinstance(error, Exception):
            raise
        return _failed(error, verbose=verbose)


def _failed(error: Exception, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    if isinstance(error, TailorError):
        _complain("; ".join(filter(None, (str(error), _notes(error)))))
        return error.exit_code
    again = "" if verbose else "; run again with -v to see where"
    _complain(f"unexpected {type(error).__name__}: {error}{again}")
    return 1


def _notes(error: BaseException) -> str:
    """What was added to an error on its way: what a run that failed half way has kept."""
    return "; ".join(getattr(error, "__notes__", ()))


class _Stops:
    """Ctrl-C and SIGTERM as an exception, so that nothing half-made stays on disk.

    Attributes:
        number: the signal that came first; None before any.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise ``KeyboardInterrupt``, which passes every handler of ordinary errors, for both."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers, or is told of signals
            return
        before = {number: signal.signal(number, self._stop) for number in _STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        self.number = self.number or number
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the clean-up
        raise KeyboardInterrupt


def _complain_of_usage(error: Any) -> None:
    sentence = error.format_message().rstrip(".")
    if sentence and launch().rank == 0:  # else the help was printed, because no command was given
        path = error.ctx.command_path if error.ctx else PROGRAM
        _complain(f"{sentence}; see `{path} --help`")


def _complain(sentence: str) -> None:
    sys.stderr.write(f"{PROGRAM}: error: {' '.join(sentence.split())}\n")
