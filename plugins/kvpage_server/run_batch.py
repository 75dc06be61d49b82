"""``kvpage run-batch``: a file of requests in, a file of answers out, through the server's routes but no socket."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import httpx

from kvpage import AsyncEngine, KvpageError, PluginRegistry
from kvpage.flags.engine import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.flags.parser import CommandParser, UsageError, check_at_least, human_integer
from kvpage_server import server_flags
from kvpage_server.app import create_app
from kvpage_server.batch import URLS, BatchCount, answer_file
from kvpage_server.command_line import read_flags
from kvpage_server.service import Service
from kvpage_server.tools import PARSERS

DESCRIPTION = f"""\
Answer the requests of a file, a JSON object a line as in OpenAI's batches, and write the answers in the same order.
Urls: {", ".join(URLS)}. A line that cannot be answered becomes an entry with its error. Ctrl-C keeps what is done."""
AT_ONCE = 256
REMOTE = ("http://", "https://")


def run(arguments: list[str]) -> int:
    """The command; its exit status: 0 once every line has its entry, whatever the entries say."""
    namespace = read_flags(make_parser(), arguments)
    check_at_least(1, namespace, "max_concurrency")
    if namespace.enable_metrics:
        raise UsageError("--enable-metrics: a batch serves nothing; its counts are told at the end")
    settings = server_flags.settings_of(_as_served(namespace), {})
    options: dict[str, Any] = engine_options(namespace)
    registry = PluginRegistry()
    with _source(namespace.input_file) as source, _target(namespace) as (target, shown):
        engine = AsyncEngine(chosen_model(namespace), plugins=registry, **options)
        try:
            app = create_app(Service(engine, settings, registry))

            def write(answer: dict[str, Any]) -> None:
                target.write(json.dumps(answer, ensure_ascii=False).encode("utf-8") + b"\n")
                target.flush()

            longest = settings.max_body_bytes
            work = answer_file(app, source, write, at_once=namespace.max_concurrency, longest=longest)
            try:
                count = asyncio.run(work)
            except KeyboardInterrupt:
                print(f"interrupted: what is done is in {shown}", file=sys.stderr)
                raise
        finally:
            engine.close()
    print(_summary(count, namespace.output_file), file=sys.stderr)
    return 0


def make_parser() -> CommandParser:
    """The parser of ``kvpage run-batch``."""
    parser = CommandParser("kvpage run-batch", DESCRIPTION, "-i FILE -o FILE [MODEL]")
    add_model_argument(parser)
    group = parser.add_argument_group("batch")
    add = group.add_argument
    add(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE",
        help="file or http(s) address with a request a line",
    )
    add(
        "-o", "--output-file", required=True, metavar="FILE", help="file, or http(s) address that takes a PUT"
    )
    add("--output-tmp-dir", metavar="FOLDER", help="where answers stand until they are put to an address")
    add("--max-concurrency", type=human_integer, default=AT_ONCE, metavar="N",
        help=f"lines under way at once [{AT_ONCE}]")  # fmt: skip
    add("--enable-metrics", action="store_true", help="not offered: refused")
    for flag in ("--host", "--port", "--url"):
        add(flag, help=argparse.SUPPRESS)  # of vLLM's metrics server
    add("--config", metavar="FILE", help="YAML with flags by name; what is typed wins")
    group = parser.add_argument_group("API")
    add = group.add_argument
    add("--served-model-name", action="extend", nargs="+", metavar="NAME",
        help="what the lines call the model [MODEL]")  # fmt: skip
    add("--response-role", metavar="ROLE", help="of chat answers [assistant]")
    add("--tool-call-parser", choices=sorted(PARSERS), metavar="NAME",
        help=f"form of the model's tool calls: {', '.join(sorted(PARSERS))}")  # fmt: skip
    for flag, text in (
        ("--enable-auto-tool-choice", "the model may call tools when it likes"),
        ("--trust-request-chat-template", "lines may bring a chat template of their own"),
        ("--return-tokens-as-token-ids", 'logprobs name tokens as "token_id:123"'),
        ("--strict-fields", "refuse unknown fields"),
    ):
        add(flag, action=argparse.BooleanOptionalAction, default=False, help=text)
    add_engine_flags(parser)
    return parser


def _as_served(namespace: argparse.Namespace) -> argparse.Namespace:
    """The flags over the defaults of ``kvpage serve``, of which a batch has but a few."""
    defaults = vars(server_flags.make_parser().parse_arguments([]))
    typed = {name: value for name, value in vars(namespace).items() if value is not None}
    return argparse.Namespace(**{**defaults, **typed})


@contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    """The requests; what stands at an address is fetched first."""
    if name.startswith(REMOTE):
        with tempfile.TemporaryFile() as fetched:
            try:
                with httpx.stream("GET", name, follow_redirects=True, timeout=60.0) as response:
                    response.raise_for_status()
                    for piece in response.iter_bytes():
                        fetched.write(piece)
            except httpx.HTTPError as error:
                raise KvpageError(f"--input-file {name}: cannot be fetched: {error}") from error
            fetched.seek(0)
            yield fetched
        return
    with _opened(name, "rb", f"--input-file {name}: cannot be read") as file:
        yield file


@contextmanager
def _target(namespace: argparse.Namespace) -> Iterator[tuple[BinaryIO, str]]:
    """Where answers go, and its name; what belongs to an address is put there at the end."""
    name = namespace.output_file
    if not name.startswith(REMOTE):
        source = namespace.input_file
        if os.path.exists(name) and os.path.exists(source) and os.path.samefile(name, source):
            raise UsageError(f"--output-file {name} is the input file too: name another")
        with _opened(name, "wb", f"--output-file {name}: cannot be written") as file:
            yield file, name
        return
    folder = namespace.output_tmp_dir
    if folder is not None and not os.path.isdir(folder):
        raise UsageError(f"--output-tmp-dir {folder}: there is no such folder; make it first")
    descriptor, kept = tempfile.mkstemp(suffix=".jsonl", prefix="kvpage-batch-", dir=folder)
    with os.fdopen(descriptor, "w+b") as file:
        yield file, kept
        file.seek(0)
        try:
            httpx.put(name, content=file, timeout=60.0).raise_for_status()
        except httpx.HTTPError as error:
            raise KvpageError(
                f"--output-file {name}: cannot be put there: {error}; the answers are in {kept}"
            ) from error
    os.unlink(kept)


def _opened(name: str, mode: Literal["rb", "wb"], trouble: str) -> BinaryIO:
    try:
        return Path(name).open(mode)
    except OSError as error:
        raise UsageError(f"{trouble}: {error.strerror}") from None


def _summary(count: BatchCount, name: str) -> str:
    failed = f", {count.failed} failed" if count.failed else ""
    return f"{count.answered} answered{failed}: {name}"
