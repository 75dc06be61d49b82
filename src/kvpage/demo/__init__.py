"""The bundled model ``demo``: a tiny Llama-architecture chat model that comes with the package.

It was trained by :mod:`kvpage.demo.train` on text that :mod:`kvpage.demo.corpus` generates; see
``README.md`` in this folder. Importing this module needs nothing but the standard library.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the folder of the bundled checkpoint (config, weights, tokenizer, chat template)."""
    return Path(__file__).resolve().parent / "checkpoint"
