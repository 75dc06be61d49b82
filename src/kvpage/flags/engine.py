"""The flags that describe an engine, and those that describe how tokens are chosen, shared by commands."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kvpage.config import EngineOptions
from kvpage.flags.fields import add_flags, given
from kvpage.flags.parser import CommandParser, UsageError
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
ENGINE_HELP = {
    "scheduling_policy": '"fcfs" or "priority"',
    "chat_template": "a template, or the name of a file with one, in place of the model's own",
}
"""Where a flag takes something else than the option."""


def add_model_argument(parser: CommandParser) -> None:
    """``MODEL`` by position or as ``--model``."""
    parser.add_argument("model_argument", metavar="MODEL", nargs="?",
                        help="folder, hub id, or demo, the model that comes with kvpage [demo]")  # fmt: skip
    parser.add_argument("--model", dest="model", metavar="MODEL", help="the same as a flag")


def chosen_model(namespace: argparse.Namespace) -> str:
    """The model that the command line names; "demo" if none.

    Raises:
        UsageError: it names two.
    """
    flag, argument = namespace.model, getattr(namespace, "model_argument", None)
    if flag is not None and argument is not None:
        raise UsageError(f"two models are named, {argument} and --model {flag}: leave one out")
    return str(flag or argument or "demo")


def model_was_named(namespace: argparse.Namespace) -> bool:
    """Whether the command line names a model at all."""
    return namespace.model is not None or getattr(namespace, "model_argument", None) is not None


def add_engine_flags(parser: CommandParser, *, skip: Collection[str] = ()) -> None:
    """Every engine option as a flag, but those in ``skip``."""
    left_out = (*NOT_ENGINE_FLAGS, *skip)
    add_flags(parser, EngineOptions, title="engine", skip=left_out, aliases=ENGINE_ALIASES, texts=ENGINE_HELP)
    # Another flag may have the name of an option that is left out: --seed of a request.
    parser.set_defaults(not_engine_options=left_out)


def engine_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for ``Engine`` from the engine flags that were typed; the model is not among them.

    Raises:
        UsageError: ``--chat-template`` is neither a file nor a template.
    """
    options = given(namespace, EngineOptions, skip=namespace.not_engine_options)
    if options.get("chat_template") is not None:
        options["chat_template"] = template_text(options["chat_template"])
    return options


def template_text(value: str) -> str:
    """A chat template that was typed, or the text of the file that was named.

    Raises:
        UsageError: there is no such file and it is no template, or the file cannot be read.
    """
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"--chat-template {value}: there is no such file, and a template itself would hold {{{{ or {{%"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--chat-template {value}: cannot be read: {reason}; name a template file") from None


def add_sampling_flags(parser: CommandParser, *, max_tokens: int | None) -> None:
    """Every sampling parameter as a flag; ``max_tokens`` is the command's own default."""
    add_flags(
        parser, SamplingParams, title="sampling", skip=NOT_SAMPLING_FLAGS, defaults={"max_tokens": max_tokens}
    )  # fmt: skip


def sampling_params(namespace: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """Sampling parameters from the flags that were typed, over ``defaults``.

    Raises:
        RequestError: a value is out of range, or two contradict each other.
    """
    return SamplingParams(**{**defaults, **given(namespace, SamplingParams)})
