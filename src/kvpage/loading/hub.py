"""Where a model's files are: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from kvpage.errors import CheckpointError

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
"""The files a checkpoint needs: weights, configs, tokenizer, chat template."""

REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def resolve(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    weights: bool = True,
    code: bool = False,
) -> Path:
    """The folder that holds ``model``: itself if it is one, else the hub's, downloaded or from the local cache.

    Args:
        weights: ``False`` fetches everything but the safetensors (a tokenizer alone).
        code: also Python files, which a user has allowed to run.

    Raises:
        CheckpointError: no such folder, and no such repository, or no network and not in the cache.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and *.safetensors")
    if not REPO_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is no folder on this machine; check the path")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{model} is no folder, and huggingface_hub is not installed to look it up on the hub; "
            "pip install huggingface_hub, or give a local folder"
        ) from error

    wanted = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"]

    def fetch(local_only: bool) -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                token=token,
                allow_patterns=[*wanted, "*.py"] if code else wanted,
                local_files_only=local_only,
            )
        )

    try:
        return fetch(local_only=False)
    except (HFValidationError, HfHubHTTPError) as error:
        status = 400 if isinstance(error, HFValidationError) else getattr(error.response, "status_code", 500)
        if status < 500:
            raise CheckpointError(f"the hub does not give {model!r}{_at(revision)}: {_first_line(error)}; "
                                  "check the name and the token, or give a local folder") from error  # fmt: skip
        cause: Exception = error
    except (LocalEntryNotFoundError, OSError) as error:
        cause = error
    try:
        return fetch(local_only=True)
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r}{_at(revision)} is no folder on this machine, is not in the local cache, and the hub cannot be "
            f"reached ({_first_line(cause)}); give a local folder, or download it where there is a network"
        ) from error


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
