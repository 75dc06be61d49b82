"""The flags of ``kvpage serve`` that are the server's own, and what they come to."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from kvpage.flags.engine import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.flags.parser import CommandParser, UsageError, human_integer
from kvpage.params import Pooling
from kvpage_server.settings import ServerSettings
from kvpage_server.tools import PARSERS

DESCRIPTION = """\
Serve a model over HTTP with OpenAI's API: /v1/chat/completions, /v1/completions and what belongs to them.
Flags of vLLM's that mean nothing here are left out with a warning; those that kvpage cannot follow are refused."""
LOCAL, PORT = "127.0.0.1", 8000
EVERY_INTERFACE = ("0.0.0.0", "::", "")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
METRICS_PREFIXES = {"kvpage": "kvpage:", "vllm": "vllm:", "both": "kvpage:,vllm:"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Listening:
    """Where and how the server listens. ``uds``: path of a Unix socket, in place of host and port."""

    host: str
    port: int
    uds: str | None
    keyfile: str | None
    certfile: str | None
    ca_certs: str | None
    cert_reqs: int
    log_level: str
    access_log: bool
    shutdown_timeout: float

    @property
    def open_to_all(self) -> bool:
        """Whether other machines reach it, as far as the address tells."""
        return self.uds is None and self.host in EVERY_INTERFACE


def make_parser() -> CommandParser:
    """The parser of ``kvpage serve``."""
    parser = CommandParser("kvpage serve", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    _add_listening(parser)
    _add_api(parser)
    _add_limits(parser)
    add_engine_flags(parser)
    return parser


def _add_listening(parser: CommandParser) -> None:
    group = parser.add_argument_group("listening")
    add = group.add_argument
    add("--host", metavar="ADDRESS", help=f"address to listen on [KVPAGE_HOST, else {LOCAL}]")
    add("--port", type=human_integer, metavar="N", help=f"0 = any that is free [KVPAGE_PORT, else {PORT}]")
    add("--uds", metavar="PATH", help="listen on a Unix socket instead")
    add("--ssl-keyfile", metavar="FILE", help="private key; with --ssl-certfile the server speaks https")
    add("--ssl-certfile", metavar="FILE", help="certificate")
    add("--ssl-ca-certs", metavar="FILE", help="certificates that clients' are checked against")
    add(
        "--ssl-cert-reqs",
        type=int,
        default=0,
        metavar="N",
        help="whether clients need one: 0 no, 1 may, 2 must",
    )
    add("--root-path", default="", metavar="PATH", help="where a proxy mounts the server")
    add(
        "--allowed-origins",
        type=_origins,
        default=(),
        metavar="JSON",
        help="origins of CORS, '[\"*\"]' for all",
    )
    _switch(group, "--allow-credentials", "CORS lets cookies through")
    add("--uvicorn-log-level", choices=LOG_LEVELS, default="info", metavar="LEVEL", help="of the HTTP server")
    _switch(group, "--disable-uvicorn-access-log", "no line a request in the log")
    add("--shutdown-timeout", type=float, default=0.0, metavar="SECONDS",
        help="how long requests may go on after SIGTERM or Ctrl-C; then they are cut off [0]")  # fmt: skip
    _switch(group, "--keep-alive-on-engine-death", "answer 500 in place of ending when the engine died")
    add("--config", metavar="FILE", help="YAML with flags by name; what is typed wins")


def _add_api(parser: CommandParser) -> None:
    group = parser.add_argument_group("API")
    add = group.add_argument
    add("--api-key", action="extend", nargs="+", metavar="KEY",
        help="key that requests must bring; repeatable [KVPAGE_API_KEY, else none is needed]")  # fmt: skip
    add("--served-model-name", action="extend", nargs="+", metavar="NAME",
        help="what clients call the model; the first is reported [MODEL]")  # fmt: skip
    add("--response-role", default="assistant", metavar="ROLE", help="of chat answers [assistant]")
    _switch(group, "--trust-request-chat-template", "requests may bring a chat template of their own")
    _switch(group, "--enable-auto-tool-choice", "the model may call tools when it likes")
    add("--tool-call-parser", choices=sorted(PARSERS), metavar="NAME",
        help=f"form of the model's tool calls: {', '.join(sorted(PARSERS)) or 'none yet'}")  # fmt: skip
    _switch(group, "--enable-force-include-usage", "every stream tells its usage")
    _switch(group, "--return-tokens-as-token-ids", 'logprobs name tokens as "token_id:123"')
    _switch(group, "--enable-tokenizer-info-endpoint", "/tokenizer_info answers")
    add("--sse-keep-alive-interval", type=float, default=0.0, metavar="SECONDS",
        help="comments on streams that are silent for so long; 0 = none [0]")  # fmt: skip
    add("--metrics-prefix", choices=sorted(METRICS_PREFIXES), default="kvpage", metavar="NAME",
        help="of the names at /metrics: kvpage, vllm or both [kvpage]")  # fmt: skip
    _switch(group, "--enable-log-requests", "one JSON line a request in the log")
    add("--max-log-len", type=human_integer, metavar="N", help="characters of a prompt in it [0]")
    add("--pooling", choices=get_args(Pooling), default="last", metavar="KIND",
        help="what makes an embedding: the hidden state of the last token, or the mean [last]")  # fmt: skip
    _switch(group, "--disable-fastapi-docs", "no /docs and no /openapi.json")
    _switch(group, "--disable-page", "no page at /")
    _switch(group, "--enable-admin", "/reset_prefix_cache and the like answer; needs a key")
    add("--enable-routes", action="extend", nargs="+", metavar="NAME", help="serve a plugin's routes")


def _add_limits(parser: CommandParser) -> None:
    group = parser.add_argument_group("limits of one request")
    add = group.add_argument
    add("--max-body-bytes", type=human_integer, metavar="N", help="[16M]")
    add("--max-header-bytes", type=human_integer, metavar="N", help="[64K]")
    add("--max-prompts", type=human_integer, metavar="N", help="prompts of one completion request [1024]")
    add(
        "--max-choices", type=human_integer, metavar="N", help="choices over all prompts of a request [16384]"
    )
    add("--max-stops", type=human_integer, metavar="N", help="stop strings [4]")
    _switch(group, "--strict-fields", "refuse unknown fields instead of naming them in a header")
    add("--overload-status", type=int, choices=(429, 503), default=503, metavar="N",
        help="answered where the queue is full: 503 or 429 [503]")  # fmt: skip


def settings_of(namespace: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """The server's settings.

    Raises:
        UsageError: flags contradict each other.
    """
    model = chosen_model(namespace)
    keys = tuple(namespace.api_key or filter(None, [environment.get("KVPAGE_API_KEY")]))
    if not all(keys):
        raise UsageError("--api-key is empty: give a key, or leave it out to need none")
    if namespace.enable_admin and not keys:
        raise UsageError("--enable-admin needs --api-key: without one everybody could use it")
    if namespace.enable_auto_tool_choice and namespace.tool_call_parser is None:
        raise UsageError(f"--enable-auto-tool-choice needs --tool-call-parser: {', '.join(sorted(PARSERS))}")
    limits = ("max_body_bytes", "max_header_bytes", "max_prompts", "max_choices", "max_stops")
    given = {name: getattr(namespace, name) for name in limits if getattr(namespace, name) is not None}
    for name, value in given.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return ServerSettings(
        model_names=tuple(namespace.served_model_name or [model]),
        model_path=model,
        api_keys=keys,
        response_role=namespace.response_role,
        enable_auto_tool_choice=namespace.enable_auto_tool_choice,
        tool_call_parser=namespace.tool_call_parser,
        trust_request_chat_template=namespace.trust_request_chat_template,
        force_include_usage=namespace.enable_force_include_usage,
        return_tokens_as_token_ids=namespace.return_tokens_as_token_ids,
        enable_tokenizer_info=namespace.enable_tokenizer_info_endpoint,
        enable_admin=namespace.enable_admin,
        enable_docs=not namespace.disable_fastapi_docs,
        enable_page=not namespace.disable_page,
        enable_routes=tuple(namespace.enable_routes or ()),
        strict_fields=namespace.strict_fields,
        overload_status=namespace.overload_status,
        sse_keep_alive=namespace.sse_keep_alive_interval,
        keep_alive_on_engine_death=namespace.keep_alive_on_engine_death,
        log_requests=namespace.enable_log_requests,
        max_log_len=namespace.max_log_len,
        metrics_prefix=METRICS_PREFIXES[namespace.metrics_prefix],
        pooling=namespace.pooling,
        root_path=namespace.root_path.rstrip("/"),
        allowed_origins=namespace.allowed_origins,
        allow_credentials=namespace.allow_credentials,
        **given,
    )


def listening_of(namespace: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Listening:
    """Where and how to listen; flags go before the environment.

    Raises:
        UsageError: KVPAGE_PORT is no port, or only half of a certificate is given.
    """
    port: int | str = environment.get("KVPAGE_PORT") or PORT if namespace.port is None else namespace.port
    if not str(port).isdecimal() or not 0 <= int(port) <= 65535:
        source = "KVPAGE_PORT" if namespace.port is None else "--port"
        raise UsageError(f"{source} must be 0 to 65535, got {port}")
    if (namespace.ssl_keyfile is None) != (namespace.ssl_certfile is None):
        raise UsageError("--ssl-keyfile and --ssl-certfile belong together: give both")
    if namespace.shutdown_timeout < 0:
        raise UsageError(f"--shutdown-timeout must be at least 0, got {namespace.shutdown_timeout:g}")
    host = namespace.host if namespace.host is not None else environment.get("KVPAGE_HOST") or LOCAL
    return Listening(
        host=host,
        port=int(port),
        uds=namespace.uds,
        keyfile=namespace.ssl_keyfile,
        certfile=namespace.ssl_certfile,
        ca_certs=namespace.ssl_ca_certs,
        cert_reqs=namespace.ssl_cert_reqs,
        log_level=namespace.uvicorn_log_level,
        access_log=not namespace.disable_uvicorn_access_log,
        shutdown_timeout=namespace.shutdown_timeout,
    )


def engine_keywords(namespace: argparse.Namespace) -> dict[str, object]:
    """Keyword arguments of AsyncEngine; servers log their numbers unless told not to."""
    return {"disable_log_stats": False, **engine_options(namespace)}


def _switch(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)


def _origins(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(origin, str) for origin in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list such as '[\"https://example.org\"]'")
    return tuple(value)
