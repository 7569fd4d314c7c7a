"""Sending a folder to the hub: private unless said otherwise, and never a pickle."""

from __future__ import annotations

from pathlib import Path

from e4t_cli.errors import UsageError, WeightsUnavailable, printable

from .inventory import check_repository, has_token
from .places import endpoint, is_offline
from .trouble import explain

_ALLOWED = ("*.safetensors", "*.toml", "*.json", "*.md", "*.txt", "*.png", "*.jpg")


def push_folder(
    folder: Path, repository: str, *, private: bool = True, message: str = "Upload by e4t"
) -> str:
    """Upload a folder as a model repository of the user's, made if it does not exist.

    Args:
        folder: what is uploaded; only files of the kinds that this program writes are.
        repository: "owner/name".
        private: for a repository that is made now.
        message: of the commit.

    Returns:
        "owner/name@commit", which is what a domain's `weights` take after "hub:".

    Raises:
        UsageError: there is no such folder, or the name is none, or it should be private and is
            open to all already.
        WeightsUnavailable: no token, no network, or no right to write there.
    """
    try:
        check_repository(repository)
    except WeightsUnavailable as error:
        raise UsageError(error.message, hint=error.hint) from error
    if not folder.is_dir():
        raise UsageError(f"there is no folder {printable(str(folder))}")
    if is_offline():
        raise WeightsUnavailable("nothing can be uploaded: e4t is offline")
    if not has_token():
        raise WeightsUnavailable("the hub does not know who you are", hint="hf auth login")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            # One that existed stays as open as it was, whatever is asked for now.
            raise UsageError(
                f"{repository} exists and is open to all: nothing was uploaded",
                hint="--public uploads into it; another name makes a private one",
            )
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(_ALLOWED),
        )
    except Exception as error:
        raise explain(error, repository) from error
    return f"{repository}@{done.oid}"
