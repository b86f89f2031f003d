"""``tailor-mergekit``: ``mergekit-yaml`` that knows ``merge_method: model_tailor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor_fast._core.errors import TailorError
from tailor_fast._core.yaml_file import read_mapping
from tailor_fast.integrations.extras import need
from tailor_fast.integrations.mergekit.method import FILES, PARAMETERS, Settings
from tailor_fast.integrations.mergekit.registering import register


def main(arguments: Sequence[str] | None = None) -> int:
    """Register the method and hand over to mergekit's own runner; returns the exit code.

    Args:
        arguments: of the command line; None takes the process's.
    """
    own, theirs = _parser().parse_known_args(arguments)
    settings = Settings()
    try:
        settings.defaults = _defaults(own)
        register(settings)
        return _run(theirs, settings)
    except TailorError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    finally:
        settings.close()


def _run(arguments: Sequence[str], settings: Settings) -> int:
    click = need("click", "mergekit")
    runner = need("mergekit.scripts.run_yaml", "mergekit")
    try:
        runner.main(args=list(arguments), prog_name="tailor-mergekit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return int(error.exit_code)
    except click.Abort:
        return 130
    kept, weights = settings.kept
    if weights:
        sys.stderr.write(f"kept {kept} of {weights} weights ({100 * kept / weights:.2f}%)\n")
    return 0


def _defaults(own: argparse.Namespace) -> dict[str, Any]:
    read = {} if own.recipe is None else read_mapping(own.recipe, PARAMETERS, "a recipe")
    files = {name: getattr(own, name) for name in FILES}
    return {**read, **{name: str(path) for name, path in files.items() if path is not None}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tailor-mergekit",
        usage="%(prog)s [options] CONFIG OUT [options of mergekit-yaml]",
        description="mergekit-yaml with the merge method model_tailor. Whatever is not listed here"
        " goes to mergekit-yaml.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--statistics", type=Path, help="what `tailor-fast calibrate` wrote for the tuned model"
    )
    parser.add_argument(
        "--retain", type=Path, help="what `tailor-fast calibrate` wrote for the base model"
    )
    parser.add_argument(
        "--recipe", type=Path, help="YAML file; what CONFIG says under `parameters` goes on top"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
