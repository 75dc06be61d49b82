"""What a server is configured with, apart from the engine's own options."""

from __future__ import annotations

from dataclasses import dataclass

from kvpage.params import Pooling

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Values, not flags: ``kvpage serve`` fills them, and so may a program that mounts the app itself.

    Attributes:
        model_names: what clients may call the model; the first is reported.
        model_path: what the engine was made from ("root" of /v1/models).
        api_keys: any of them opens the guarded routes; none = open.
        response_role: role of chat answers.
        enable_auto_tool_choice: ``tool_choice="auto"`` is answered.
        tool_call_parser: name of the parser that finds tool calls in the text ("hermes", "llama3_json").
        trust_request_chat_template: requests may bring a template of their own.
        force_include_usage: every stream ends with usage.
        return_tokens_as_token_ids: logprobs name tokens as "token_id:123".
        enable_tokenizer_info: /tokenizer_info answers.
        enable_admin: /reset_prefix_cache and the like answer; needs a key.
        enable_docs: /docs and /openapi.json.
        enable_page: the page at / and the block map behind it.
        enable_routes: names of plugins' routes to serve.
        strict_fields: unknown request fields are refused instead of named in a header.
        max_body_bytes, max_prompts, max_choices, max_stops, max_header_bytes: limits of one request.
        overload_status: 503 or 429, where the queue is full.
        sse_keep_alive: seconds between comments on an idle stream; 0 = none.
        keep_alive_on_engine_death: stay up and answer 500 after the engine died.
        log_requests: one JSON line a request. max_log_len: characters of a prompt in it, else none.
        metrics_prefix: of every metric's name ("kvpage:", "vllm:"); several, with commas between them, for the same
            values under each.
        pooling: which hidden states make an embedding: that of the "last" token, or the "mean".
        root_path: where a proxy mounts the server.
        allowed_origins: of CORS; empty = CORS off. allow_credentials: CORS lets cookies through.
    """

    model_names: tuple[str, ...]
    model_path: str = ""
    api_keys: tuple[str, ...] = ()
    response_role: str = "assistant"
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    trust_request_chat_template: bool = False
    force_include_usage: bool = False
    return_tokens_as_token_ids: bool = False
    enable_tokenizer_info: bool = False
    enable_admin: bool = False
    enable_docs: bool = True
    enable_page: bool = True
    enable_routes: tuple[str, ...] = ()
    strict_fields: bool = False
    max_body_bytes: int = 16 * MIB
    max_prompts: int = 1024
    max_choices: int = 16384
    max_stops: int = 4
    max_header_bytes: int = 64 * 1024
    overload_status: int = 503
    sse_keep_alive: float = 0.0
    keep_alive_on_engine_death: bool = False
    log_requests: bool = False
    max_log_len: int | None = None
    metrics_prefix: str = "kvpage:"
    pooling: Pooling = "last"
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allow_credentials: bool = False
