"""Models that are named as the Hugging Face hub names them, found in its local cache.

Nothing is fetched: a run that stops half way because a server does, or that fills a disk with a
model that was mistyped, serves nobody. ``hf download`` fetches.
"""

from __future__ import annotations

import re
from pathlib import Path

from tailor_fast.checkpoint.errors import AnyPath, MissingFileError

# As a hub names models, and a branch, tag or commit after `@`.
REPOSITORY = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]*[\w-])(?:@(?P<revision>[\w./-]+))?", re.ASCII)

_FILES = (".safetensors", ".json")  # a missing file, not a model of that name


def is_hub_name(name: AnyPath) -> bool:
    """Whether a name that is no path can be a model's on the hub: ``owner/model[@revision]``."""
    path = Path(name)
    reads = REPOSITORY.fullmatch(str(name)) is not None
    return reads and path.suffix not in _FILES and not path.exists()


def local_path(name: AnyPath) -> Path:
    """Return where a model lies that is given by path or by hub name.

    A path that exists is meant as such, whatever it looks like. Else ``owner/model`` or
    ``owner/model@revision`` is looked up in the local Hugging Face cache (``HF_HOME`` says where);
    without a revision it is what ``main`` was when it was fetched.

    Args:
        name: path or hub name.

    Returns:
        The path as given, or the directory of the snapshot in the cache.

    Raises:
        MissingFileError: it reads like a hub name, and neither is there.
    """
    path = Path(name)
    told = REPOSITORY.fullmatch(str(name))
    if told is None or not is_hub_name(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, revision = told["id"], told["revision"]
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        at = f" --revision {revision}" if revision else ""
        problem = "is no path, and no model of that name is in the local Hugging Face cache"
        remedy = f"check the path, or fetch the model: hf download {repository}{at}"
        raise MissingFileError(problem, path=path, remedy=remedy) from None
