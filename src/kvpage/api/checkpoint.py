"""The contract of a checkpoint reader: one file format of weights."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpage.errors import CheckpointError

if TYPE_CHECKING:
    from kvpage.api.quant import CheckpointView


class CheckpointReader(ABC):
    """Opens one checkpoint; it is made anew for each engine, with the folder (or file) that was named.

    Making one, and ``config``, must be cheap: ``kvpage plan`` does both. Errors are
    ``kvpage.errors.CheckpointError`` and name the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> Mapping[str, Any]:
        """The model's config under Hugging Face's keys; by default config.json of the folder.

        A format that keeps it in metadata (GGUF) translates; ``quantization_config.quant_method`` names the
        scheme that reads its weights.
        """
        path = self.path / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} must hold a JSON object, found a {type(found).__name__}")
        return found

    @abstractmethod
    def weights(self) -> CheckpointView:
        """The tensors, by the checkpoint's own names; headers are read, data is not."""

    def tokenizer(self) -> str | None:
        """The tokenizer as the text of a tokenizer.json; ``None``: the tokenizer files of the folder are used."""
        return None
