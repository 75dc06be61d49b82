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


MAX_JSON_BYTES = 64 * 2**20


OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where older tools left ``quantization_config``, and the ``quant_method`` that such a file means without one."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of ``folder``; where it has no ``quantization_config``, with that of auto-gptq's or AutoAWQ's
    own file.

    Raises:
        CheckpointError: no such file, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give the folder of a checkpoint in Hugging Face layout "
            "(config.json, *.safetensors, tokenizer files)"
        )
    config = read_json_object(path)
    if config.get("quantization_config") is None:
        for name, method in OWN_FILES.items():
            if (folder / name).is_file():
                own = read_json_object(folder / name)
                config["quantization_config"] = {**own, "quant_method": own.get("quant_method") or method}
                break
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: unreadable, larger than 64 MiB, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are read; is it the right file?"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


class CheckpointReader(ABC):
    """Opens one checkpoint; it is made anew for each engine, with the folder (or file) that was named.

    Making one, and ``config``, must be cheap: ``kvpage plan`` does both. Errors are
    ``kvpage.errors.CheckpointError`` and name the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> Mapping[str, Any]:
        """The model's config under Hugging Face's keys; by default config.json of the folder, or beside the file.

        A format that keeps it in metadata (GGUF) translates; ``quantization_config.quant_method`` names the
        scheme that reads its weights.
        """
        return read_config(self.path.parent if self.path.is_file() else self.path)

    @abstractmethod
    def weights(self) -> CheckpointView:
        """The tensors, by the checkpoint's own names; headers are read, data is not."""

    def tokenizer(self) -> str | None:
        """The tokenizer as the text of a tokenizer.json; ``None``: the tokenizer files of the folder are used."""
        return None

    def tokenizer_config(self) -> Mapping[str, Any] | None:
        """What stands in for the folder's tokenizer_config.json (special tokens, ``chat_template``) and its template
        files beside ``tokenizer``; ``None``: the folder's are used."""
        return None

    def generation_config(self) -> Mapping[str, Any] | None:
        """What stands in for the folder's generation_config.json: sampling defaults, and the tokens that end a text;
        ``None``: the folder's is used."""
        return None
