"""``tailor-fast evaluate``: models on old and new tasks, to one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast._core.errors import UsageError
from tailor_fast.cli.options import Quietable

if TYPE_CHECKING:
    from tailor_fast.evaluation import EvaluationTask, ModelScores


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Quietable):
    """``MODEL... --old FILE --new FILE -o DIR``."""

    models: Annotated[
        list[Path] | None, typer.Argument(metavar="MODEL...", help="Checkpoint directories.")
    ] = None
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of predictions and table.")
    ]
    base: Annotated[
        Path | None,
        typer.Option(metavar="BASE", help="First row; its old tasks are 100% kept."),
    ] = None
    tuned: Annotated[
        Path | None,
        typer.Option(metavar="TUNED", help="Second row; its new tasks are 100% kept."),
    ] = None
    old: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.jsonl", help="Samples of an old task; may be repeated."),
    ] = None
    new: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.jsonl", help="Samples of a new task; may be repeated."),
    ] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]METRIC",
            help="exact, vqa, cider or bleu, of all tasks, or of the one in a file of that name.",
            show_default="exact",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Use N of each file, evenly spaced.", show_default="all"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at once.")] = 8
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 32
    max_length: Annotated[
        int, typer.Option(min=1, metavar="N", help="Refuse prompts of more tokens.")
    ] = 2048
    num_beams: Annotated[
        int, typer.Option(min=1, metavar="N", help="Beams of the search; 1 is greedy.")
    ] = 1
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda:N", help="Where the models run.")
    ] = "auto"
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Begin anew where DIR has predictions of something else."),
    ] = False


def evaluate(options: EvaluateOptions) -> None:
    """Let models answer old and new tasks; what was answered before is not asked again."""
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.settings import device_name
    from tailor_fast.evaluation import GenerationOptions, evaluate_models

    tasks = _tasks(options)
    models = _models(options)
    generation = GenerationOptions(
        device=device_name(options.device),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        num_beams=options.num_beams,
    )
    base, tuned = (None if path is None else path.name for path in (options.base, options.tuned))
    with shown(options.quiet) as progress:
        scores = evaluate_models(
            models,
            tasks,
            options.out,
            base=base,
            tuned=tuned,
            options=generation,
            samples=options.samples,
            overwrite=options.overwrite,
            progress=progress,
        )
    if not options.quiet:
        _show(scores, base, tuned, options.out)


def _models(options: EvaluateOptions) -> dict[str, Path]:
    """Rows by the models' names."""
    given = [path for path in (options.base, options.tuned, *(options.models or ())) if path]
    names = [path.name for path in given]
    if not given:
        raise UsageError("no model is given; expected MODEL, --base or --tuned")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two models are called {twice!r}; rename a directory, or link to it")
    return dict(zip(names, given, strict=True))


def _tasks(options: EvaluateOptions) -> list[EvaluationTask]:
    from tailor_fast.evaluation import EvaluationTask

    files = [(path, False) for path in options.old or ()]
    files += [(path, True) for path in options.new or ()]
    if not files:
        raise UsageError("no task is given; expected --old or --new with a data file")
    default, chosen = _metrics(options.metric or (), {path.stem for path, _ in files})
    return [
        EvaluationTask(path.stem, path, chosen.get(path.stem, default), new) for path, new in files
    ]


def _metrics(given: Sequence[str], tasks: set[str]) -> tuple[str, Mapping[str, str]]:
    """The metric of all tasks, and those of single ones."""
    default, chosen = "exact", {}
    for text in given:
        task, equals, metric = text.rpartition("=")
        if not equals:
            default = metric
        elif task not in tasks:
            raise UsageError(f"--metric {text}: no task is called {task!r}; expected a file's name")
        else:
            chosen[task] = metric
    return default, chosen


def _show(
    scores: Mapping[str, ModelScores], base: str | None, tuned: str | None, out: Path
) -> None:
    from tailor_fast.cli.tables import facts, show, table
    from tailor_fast.evaluation import table_rows

    rows = table_rows(scores, base=base, tuned=tuned)
    used = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    show(table(used, [[_cell(name, row[name]) for name in used] for row in rows]))
    show("")
    show(facts({"table": out / "results.csv", "predictions": out / "predictions"}))


def _cell(name: str, value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.1f}%" if name.endswith(" kept") else f"{value:.1f}"
