"""Which folder a model's name means."""

from __future__ import annotations

from pathlib import Path

from kvpage.config import EngineOptions
from kvpage.loading.hub import resolve

BUNDLED_MODEL = "demo"


def find_folder(options: EngineOptions, *, weights: bool = True) -> Path:
    """The folder of ``options.model``: itself, the bundled model's, or the local copy of one on the hub.

    ``weights=False``: of one on the hub, config and headers are enough.

    Raises:
        CheckpointError: there is none.
    """
    if options.model == BUNDLED_MODEL:
        from kvpage import demo  # package data, needed by those who ask for it

        return demo.path()
    return resolve(
        str(options.model),
        revision=options.revision,
        download_dir=options.download_dir,
        token=options.hf_token,
        weights=weights,
    )
