"""``kvpage generate``: prompts in, text out as it is made."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvpage.cli.main import OK
from kvpage.cli.session import Stopwatch, chat_prompt, follow, has_chat_template, open_engine, speed_note
from kvpage.cli.signals import interruptible
from kvpage.errors import RequestError
from kvpage.flags.engine import add_engine_flags, add_sampling_flags, sampling_params
from kvpage.flags.parser import CommandParser
from kvpage.outputs import Logprob, PositionLogprobs, RequestOutput

if TYPE_CHECKING:
    from kvpage.engine.engine import Engine, RequestHandle

DESCRIPTION = """\
Answer or continue prompts. A model with a chat template is asked each prompt as a question; --raw continues the text
instead. Without a prompt, stdin is the prompt. Several prompts run in one batch and are printed in order."""

DEFAULT_MAX_TOKENS = 512


def run(arguments: Sequence[str]) -> int:
    """The command."""
    return answer(make_parser("kvpage generate", DESCRIPTION).parse_arguments(arguments))


def answer(namespace: argparse.Namespace) -> int:
    """Answer or continue what the flags say."""
    params = sampling_params(namespace, max_tokens=DEFAULT_MAX_TOKENS)
    prompts = read_prompts(namespace.prompts)
    with open_engine(namespace) as engine, interruptible() as asked_to_stop:

        def check_stop() -> None:
            if asked_to_stop():
                raise KeyboardInterrupt  # between two steps

        chat = namespace.chat or (not namespace.raw and has_chat_template(engine))
        watch = Stopwatch()
        handles = [engine.submit(_prompt(engine, text, namespace, chat), params) for text in prompts]
        if namespace.json:
            for handle in handles:
                while not handle.done:
                    check_stop()
                    engine.step()
                print(json.dumps(output_as_dict(handle.result()), ensure_ascii=False), flush=True)
        else:
            print_texts(engine, prompts, handles, check_stop)
        if namespace.stats:
            print(speed_note([handle.output for handle in handles], watch.seconds), file=sys.stderr)
    return OK


def make_parser(prog: str, description: str, *, raw: bool = False) -> CommandParser:
    """The flags of the command; ``raw``: those of one that only ever continues text."""
    parser = CommandParser(prog, description, "[PROMPT ...]")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text; - is stdin")
    parser.add_argument(
        "--model", metavar="MODEL", help="folder, hub id, or demo, which comes with kvpage [demo]"
    )
    parser.set_defaults(chat=False, raw=raw, system=None)
    if not raw:
        style = parser.add_mutually_exclusive_group()
        style.add_argument(
            "--chat", action="store_true", help="ask through the chat template; an error if there is none"
        )
        style.add_argument("--raw", action="store_true", help="continue the text as it stands")
        parser.add_argument("--system", metavar="TEXT", help="a system message before each question")
    parser.add_argument("--stats", action="store_true", help="tokens and times on stderr at the end")
    parser.add_argument("--json", action="store_true", help="a JSON object a prompt, when it is finished")
    add_sampling_flags(parser, max_tokens=DEFAULT_MAX_TOKENS)
    add_engine_flags(parser, skip=("seed",))
    return parser


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of the command line; stdin for "-", or where there are none.

    Raises:
        RequestError: none was given and nothing is piped in, one is empty, or stdin is not text.
    """
    if not arguments and (sys.stdin is None or sys.stdin.isatty()):
        raise RequestError(
            'no prompt: kvpage generate "What is a KV cache?", or pipe a text in', param="prompt"
        )
    prompts = [_read_stdin() if text == "-" else text for text in arguments or ("-",)]
    if not all(prompt.strip() for prompt in prompts):
        raise RequestError("the prompt is empty: give at least one character", param="prompt")
    return prompts


def _read_stdin() -> str:
    if sys.stdin is None:
        raise RequestError("- is standard input, which is closed: give the prompt as text", param="prompt")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text ({error}): give text", param="prompt") from error


def print_texts(
    engine: Engine, prompts: Sequence[str], handles: Sequence[RequestHandle], check_stop: Callable[[], None]
) -> None:
    """Every choice of every prompt in order, each as it grows; headed where there is more than one.

    ``check_stop`` is called between two steps, and may raise.
    """
    several = len(handles) > 1 or len(handles[0].output.outputs) > 1
    for prompt, handle in zip(prompts, handles, strict=True):
        for choice in range(len(handle.output.outputs)):
            if several:
                print(f"==> {_short(prompt)}{f' [{choice}]' if len(handle.output.outputs) > 1 else ''}")
            follow(engine, handle, choice, lambda text: print(text, end="", flush=True), check_stop)
            print()


def output_as_dict(output: RequestOutput) -> dict[str, Any]:
    """A RequestOutput as plain data for JSON."""
    metrics = output.metrics
    data: dict[str, Any] = {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {
                "index": choice.index,
                "text": choice.text,
                "token_ids": choice.token_ids,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **({} if choice.logprobs is None else {"logprobs": [*_logprobs(choice.logprobs)]}),
            }
            for choice in output.outputs
        ],
        "metrics": {
            "queued": metrics.queued,
            "prefill": metrics.prefill,
            "decode": metrics.decode,
            "cached_tokens": metrics.cached_tokens,
            "preemptions": metrics.preemptions,
        },
    }
    if output.prompt_logprobs is not None:
        data["prompt_logprobs"] = [*_logprobs(output.prompt_logprobs)]
    return data


def _logprobs(positions: Sequence[PositionLogprobs | None]) -> Iterator[dict[str, Any] | None]:
    def entry(candidate: Logprob) -> dict[str, Any]:
        return {
            "logprob": candidate.logprob,
            "rank": candidate.rank,
            "decoded_token": candidate.decoded_token,
        }

    for position in positions:
        yield None if position is None else {str(token): entry(found) for token, found in position.items()}


def _prompt(engine: Engine, text: str, namespace: argparse.Namespace, chat: bool) -> Any:
    if not chat:
        return text if not namespace.system else f"{namespace.system}\n\n{text}"
    system = [{"role": "system", "content": namespace.system}] if namespace.system else []
    return chat_prompt(engine, [*system, {"role": "user", "content": text.removesuffix("\n")}])


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 72 else line[:69] + "..."
