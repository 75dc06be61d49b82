"""The flags that describe an engine, and those that describe how tokens are chosen, shared by commands."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from kvpage.cli.flags import add_flags, given
from kvpage.cli.parser import CommandParser
from kvpage.config import EngineOptions
from kvpage.params import SamplingParams

ENGINE_ALIASES = {
    "tensor_parallel_size": ("-tp",),
    "quantization": ("-q",),
    "kv_cache_memory": ("--kv-cache-memory-bytes",),
    "num_kv_blocks": ("--num-gpu-blocks-override",),
}
NOT_ENGINE_FLAGS = ("model", "prefix_cache_key")
"""The model is a command's own argument; a secret key does not belong on a command line."""

NOT_SAMPLING_FLAGS = ("detokenize",)


def add_model_argument(parser: CommandParser) -> None:
    """``MODEL`` by position or as ``--model``."""
    parser.add_argument("model_argument", metavar="MODEL", nargs="?",
                        help="folder, hub id, or demo, the model that comes with kvpage [demo]")  # fmt: skip
    parser.add_argument("--model", dest="model", metavar="MODEL", help="the same as a flag")


def chosen_model(namespace: argparse.Namespace) -> str:
    """The model that the command line names; "demo" if none."""
    return str(namespace.model or getattr(namespace, "model_argument", None) or "demo")


def add_engine_flags(parser: CommandParser, *, skip: Collection[str] = ()) -> None:
    """Every engine option as a flag, but those in ``skip``."""
    add_flags(parser, EngineOptions, title="engine", skip=(*NOT_ENGINE_FLAGS, *skip), aliases=ENGINE_ALIASES)


def engine_options(namespace: argparse.Namespace, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Keyword arguments for ``Engine`` from the flags that were typed; the model is not among them."""
    return given(namespace, EngineOptions, skip=("model", *skip))


def add_sampling_flags(parser: CommandParser, *, max_tokens: int | None) -> None:
    """Every sampling parameter as a flag; ``max_tokens`` is the command's own default."""
    add_flags(
        parser, SamplingParams, title="sampling", skip=NOT_SAMPLING_FLAGS, defaults={"max_tokens": max_tokens}
    )


def sampling_params(namespace: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """Sampling parameters from the flags that were typed, over ``defaults``.

    Raises:
        RequestError: a value is out of range, or two contradict each other.
    """
    return SamplingParams(**{**defaults, **given(namespace, SamplingParams)})
