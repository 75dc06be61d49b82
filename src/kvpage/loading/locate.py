"""Which folder a model's name means."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from kvpage.config import EngineOptions
from kvpage.loading.hub import resolve

BUNDLED_MODEL = "demo"


def find_folder(options: EngineOptions, *, weights: bool = True, files: Collection[str] = ()) -> Path:
    """The folder of ``options.model``: itself, the bundled model's, or the local copy of one on the hub.

    Args:
        weights: ``False``: of one on the hub, config and headers are enough.
        files: shell patterns of checkpoints that are one file: such a file is given back as it is.

    Raises:
        CheckpointError: there is none.
    """
    if options.model == BUNDLED_MODEL:
        from kvpage import demo  # package data, needed by those who ask for it

        return demo.path()
    named = Path(str(options.model)).expanduser()
    if named.is_file() and any(fnmatchcase(named.name, pattern) for pattern in files):
        return named
    return resolve(
        str(options.model),
        revision=options.revision,
        download_dir=options.download_dir,
        token=options.hf_token,
        weights=weights,
        code=options.trust_remote_code,
    )
