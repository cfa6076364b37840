"""A folder on the Hugging Face hub, through huggingface_hub, which timm brings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from ssl.hub import unreachable


def check_push(repository: str) -> None:
    """Raise ValueError where `repository` is no `user/name`, where there is no token, or where the hub is out of reach.

    Asked before any work, so that a push that cannot succeed costs nothing.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"push={repository} is no repository of the hub; give push=<user>/<name>")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"push={repository} needs a token that may write: run `hf auth login`, or set HF_TOKEN; "
            "https://huggingface.co/settings/tokens makes one"
        )
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if reason:
        raise ValueError(
            f"push={repository} needs {constants.ENDPOINT}: {reason}. Leave push= out, and where there is one run "
            f"`hf upload {repository} <out> .`"
        )


def push(repository: str, folder: Path, files: Sequence[str]) -> str:
    """Upload the named files of a folder to a repository of the hub, made where there is none; returns its address."""
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(files))
    except OSError as error:  # huggingface_hub's HTTP errors are
        raise OSError(
            f"{folder} is written, and could not be pushed to {repository}: {error}. To try again: "
            f"`hf upload {repository} {folder} .`"
        ) from error
    return str(url)
