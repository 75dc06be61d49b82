"""What the commands that run a model share: the engine from its flags, prompts, and text as it comes."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from kvpage.cli.engine_flags import chosen_model, engine_options
from kvpage.cli.parser import UsageError
from kvpage.outputs import RequestOutput

if TYPE_CHECKING:
    from kvpage.engine.engine import Engine, RequestHandle

LOG = logging.getLogger("kvpage")


def open_engine(namespace: argparse.Namespace, **overrides: Any) -> Engine:
    """The engine that the command line describes; to be used in a ``with`` statement.

    ``overrides`` are options that the command sets itself where their flag was not typed.
    """
    from kvpage.engine.engine import Engine  # torch, a second

    options = {**overrides, **engine_options(namespace)}
    template = options.get("chat_template")
    if template is not None and "\n" not in template and len(template) < 1024 and Path(template).is_file():
        options["chat_template"] = Path(template).read_text(encoding="utf-8")
    model = chosen_model(namespace)
    if model == "demo" and namespace.model is None and getattr(namespace, "model_argument", None) is None:
        LOG.info("model: demo, the small one that comes with kvpage (another: --model FOLDER or hub id)")
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
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Step the engine until one choice has ended, passing its text on as it grows.

    Other requests of the engine advance with it; what they and the other choices gain stays in their outputs.
    Once ``stopped()`` is true the request is cancelled, between two steps.

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
        if stopped():
            handle.cancel()
        else:
            engine.step()
    if handle.done:
        handle.result()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While entered, Ctrl-C interrupts nothing: it makes the given function true. A second one interrupts.

    A step of the engine is left whole that way. Signals belong to the main thread; elsewhere nothing changes.
    """
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def speed_note(outputs: Sequence[RequestOutput], seconds: float) -> str:
    """One line on what a run cost."""
    tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.metrics.cached_tokens for output in outputs)
    first = [output.metrics.time_to_first_token for output in outputs]
    times = [seconds_to_first for seconds_to_first in first if seconds_to_first is not None]
    delay = f", first token after {1000 * min(times):.0f} ms" if times else ""
    hit = f" ({cached} from the prefix cache)" if cached else ""
    return f"{prompt} prompt tokens{hit}, {tokens} new in {seconds:.2f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s{delay}"


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
