"""What the commands that run a model share: the engine from its flags, prompts, and text as it comes."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpage.cli.signals import undivided
from kvpage.flags.engine import chosen_model, engine_options, model_was_named
from kvpage.flags.parser import UsageError
from kvpage.outputs import RequestOutput

if TYPE_CHECKING:
    from kvpage.engine.engine import Engine, RequestHandle

LOG = logging.getLogger("kvpage")


def open_engine(namespace: argparse.Namespace, **overrides: Any) -> Engine:
    """The engine that the command line describes; to be used in a ``with`` statement.

    ``overrides`` are options that the command sets itself where their flag was not typed.
    """
    options = {**overrides, **engine_options(namespace)}
    model = chosen_model(namespace)
    if not model_was_named(namespace):
        LOG.info("model: demo, the small one that comes with kvpage (another: --model FOLDER or hub id)")
    with undivided():
        from kvpage.engine.engine import Engine  # torch, a second

        return Engine(model, **options)


def has_chat_template(engine: Engine) -> bool:
    """Whether conversations can be written out for this model."""
    template = engine.options.chat_template or (engine.tokenizer.chat_template if engine.tokenizer else None)
    return template is not None


def chat_prompt(engine: Engine, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A conversation as a prompt for ``Engine.submit``.

    Raises:
        RequestError: the model has no chat template, or no tokenizer.
    """
    text = engine.render_chat(messages)
    assert engine.tokenizer is not None, "a chat template comes with a tokenizer"
    return {"prompt": text, "prompt_token_ids": engine.tokenizer.encode(text, add_special_tokens=False)}


def follow(
    engine: Engine,
    handle: RequestHandle,
    choice: int,
    write: Callable[[str], None],
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """Step the engine until one choice has ended, passing its text on as it grows.

    Other requests of the engine advance with it; what they and the other choices gain stays in their outputs.
    ``before_step`` may cancel the request.

    Raises:
        KvpageError: what ended the request in error.
    """
    shown = 0
    output = handle.output.outputs[choice]
    while True:
        # Read before the text: whoever sees the end sees all of the text.
        ended = output.finish_reason is not None or handle.done
        text = output.text
        if len(text) > shown:
            write(text[shown:])
            shown = len(text)
        if ended:
            break
        before_step()
        if not handle.done:
            engine.step()
    if handle.done:
        handle.result()


def speed_note(outputs: Sequence[RequestOutput], seconds: float) -> str:
    """One line on what a run cost."""
    tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    prompt = counted(sum(len(output.prompt_token_ids) for output in outputs), "prompt token")
    cached = sum(output.metrics.cached_tokens for output in outputs)
    first = [output.metrics.time_to_first_token for output in outputs]
    times = [seconds_to_first for seconds_to_first in first if seconds_to_first is not None]
    delay = f", first token after {1000 * min(times):.0f} ms" if times else ""
    hit = f" ({cached} from the prefix cache)" if cached else ""
    return (
        f"{prompt}{hit}, {tokens} new in {seconds:.2f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s{delay}"
    )


def counted(number: int, noun: str) -> str:
    """ "1 fork", "2 forks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_output(path: str | None) -> None:
    """Before a run whose result is to be written to ``path``, if it is to be written.

    Raises:
        UsageError: it cannot be written there.
    """
    if path is None:
        return
    file = Path(path)
    try:
        folder = file.parent
        if file.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder; name a file in it")
        if not folder.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {folder}; make it first")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise UsageError(f"{path} cannot be written: permission denied; choose another place")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def write_file(path: str, text: str) -> None:
    """Write a result.

    Raises:
        UsageError: it cannot be written there.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began
