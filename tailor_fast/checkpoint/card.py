"""The model card of an output: front matter that model hubs read, the recipe, what was kept."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tailor_fast._core.regular_file import read_regular
from tailor_fast.checkpoint.hub import REPOSITORY
from tailor_fast.checkpoint.sidefiles import CARD_NAME

_LICENSE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", re.MULTILINE)
_LIMIT = 2**20  # bytes of a card or a configuration that are looked at
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's local cache


def model_name(path: Path) -> str:
    """Return what to call a checkpoint in public: its place on this machine is nobody's business.

    The hub's name where the path is in its local cache or the configuration tells one, else the
    name of the directory or file.
    """
    absolute = path.absolute()
    for part in absolute.parts:
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            return f"{cached[1]}/{cached[2]}"
    try:
        told = json.loads(read_regular(absolute / "config.json", _LIMIT))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        told = None  # the reader of the checkpoint says what is wrong with it
    named = REPOSITORY.fullmatch(told) if isinstance(told, str) else None
    return named["id"] if named else absolute.name


def read_license(directory: Path) -> str | None:
    """Return the ``license`` of the model card in ``directory``; None when it names none."""
    path = directory / CARD_NAME
    try:
        text = read_regular(path)[:_LIMIT].decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:  # no card, or none that can be read: then it names no license
        return None
    if not text.startswith("---\n"):
        return None
    match = _LICENSE.search(text[4:].split("\n---", 1)[0])
    return None if match is None else match[1]


def model_card(
    *,
    title: str,
    base_models: Sequence[str],
    recipe: Mapping[str, object],
    kept: Mapping[str, tuple[int, int]],
    license: str | None = None,  # noqa: A002  the key's name in a card
    library_name: str = "transformers",
) -> str:
    """Return the text of ``README.md``.

    Args:
        title: heading.
        base_models: names of BASE and of every TUNED model.
        recipe: option names and values.
        kept: per tensor or group of tensors, kept and all weights.
        license: carried over from TUNED.
        library_name: what loads the model.
    """
    # every JSON string is a YAML string, whatever characters it holds
    matter = ["---", "base_model:", *(f"- {_quoted(name)}" for name in base_models)]
    matter += ["base_model_relation: merge", f"library_name: {_quoted(library_name)}"]
    matter += ["tags:", "- merge", "- model-tailor", "- tailor_fast"]
    matter += [f"license: {_quoted(license)}"] if license else []
    body = [
        f"# {title}",
        "",
        "Made by Model Tailor ([arXiv 2402.12048](https://arxiv.org/abs/2402.12048)): of the",
        "fine-tuned weights, the few listed below were kept and adjusted; every other weight is",
        "that of the base model.",
        "",
        "## Recipe",
        "",
        *_table(
            ("option", "value"),
            [(name, json.dumps(value, ensure_ascii=False)) for name, value in recipe.items()],
        ),
        "",
        "## Kept weights",
        "",
        *_table(("weights", "kept", "of", "%"), _kept_rows(kept)),
    ]
    return "\n".join([*matter, "---", "", *body]) + "\n"


def _kept_rows(kept: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    total = (sum(some for some, _ in kept.values()), sum(every for _, every in kept.values()))
    rows = [*kept.items(), ("all of these", total)]
    return [
        (name, f"{some}", f"{every}", f"{100 * some / every:.2f}" if every else "-")
        for name, (some, every) in rows
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return [f"| {' | '.join(line)} |" for line in cells]
