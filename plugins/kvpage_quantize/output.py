"""The folder that is written: refused where it holds something, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvpage import ConfigError, KvpageError

BESIDE_THE_WEIGHTS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of a checkpoint that are copied: tokenizer, generation config, chat template, code, licence."""

FOLDERS_BESIDE = ("additional_chat_templates",)
OF_THE_WEIGHTS = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "*.safetensors.index.json",
    "*.bin.index.json",
)
"""Files that describe the unquantized weights."""

REPLACED = ("*.safetensors", "*.safetensors.index.json", "quantize_config.json", "quant_config.json")
"""What must not outlive an earlier checkpoint in a folder that is written again."""


def check_output(folder: Path, source: Path, *, force: bool) -> None:
    """Whether ``folder`` may be written.

    Raises:
        ConfigError: it is a file, the source itself, or holds something and ``force`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; give the folder to write")
    if folder.resolve() == source.resolve():
        raise ConfigError(f"--out {folder} is the checkpoint that is quantized; give another folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(
            f"--out {folder} is not empty; give another folder, or --force to replace its checkpoint"
        )


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, whose files take their place in it once all is well; else it is gone.

    Raises:
        KvpageError: the place cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise KvpageError(f"{partial} cannot be made: {error.strerror}; give another --out") from error
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        for pattern in REPLACED:
            for stale in folder.glob(pattern):
                stale.unlink()
        for path in sorted(partial.iterdir()):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source: Path, folder: Path) -> None:
    """Everything of the checkpoint ``source`` but its weights and its config."""
    for pattern in BESIDE_THE_WEIGHTS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not any(path.match(other) for other in OF_THE_WEIGHTS):
                shutil.copyfile(path, folder / path.name)
    for name in FOLDERS_BESIDE:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def write_config(
    folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: str | None = None
) -> None:
    """config.json with ``quantization_config``.

    Args:
        dtype: of the tensors that stay plain, where it is not the checkpoint's own.
    """
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype is not None:
        _state_dtype(written, dtype)
    written["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", written)


def write_json(path: Path, value: object) -> None:
    """``value`` in the way that transformers lays its files out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _state_dtype(config: dict[str, Any], dtype: str) -> None:
    """Under the key that is there already (transformers 4 and 5 differ), in the text part of a larger model too."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    config.update(dict.fromkeys(keys or ["torch_dtype"], dtype))
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = dict(text)
        inner.update({key: dtype for key in ("dtype", "torch_dtype") if key in inner})
        config["text_config"] = inner
