"""Sending an output to the Hugging Face hub, through ``huggingface_hub``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tailor_fast._core.errors import StorageError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Push:
    """An upload that is known to be allowed before the work begins.

    Nothing is sent before ``send``.

    Args:
        repository: model repository, ``owner/name``, or ``name`` for one's own.
        private: make the repository a private one, if it has to be made.

    Raises:
        UsageError: the name is none, nobody is logged in, or the client is told to stay offline.
    """

    def __init__(self, repository: str, *, private: bool = False) -> None:
        """Check the name and ask the hub who is logged in."""
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HFValidationError

        self.repository = repository
        self._private = private
        self._api: HfApi = HfApi()
        try:
            hf_hub_url(repository, "config.json")  # asks nobody, but looks at the name
            owner = self._api.whoami()["name"]
        except HFValidationError as error:
            raise UsageError(f"--push-to-hub {repository}: {error}") from None
        except Exception as error:  # noqa: BLE001  whatever the client, its transport or a proxy raise
            raise UsageError(
                f"--push-to-hub {repository}: the hub does not know who asks ({_told(error)}); log"
                " in with `hf auth login`, or leave --push-to-hub out"
            ) from None
        if "/" not in repository:
            self.repository = f"{owner}/{repository}"

    def send(self, folder: Path) -> str:
        """Make the repository if it is not there and upload every file of ``folder``.

        Returns:
            Address of the commit.

        Raises:
            StorageError: the hub refused, or could not be reached; ``folder`` is complete.
        """
        try:
            self._api.create_repo(self.repository, private=self._private, exist_ok=True)
            done = self._api.upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                commit_message="Upload a model patched by tailor_fast",
            )
        except Exception as error:
            raise StorageError(
                f"{folder} is complete, but was not sent to {self.repository}: {_told(error)}; send"
                f" it with `hf upload {self.repository} {folder}`"
            ) from error
        return str(done.commit_url)


def _told(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
