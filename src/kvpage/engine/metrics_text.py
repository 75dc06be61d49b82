"""The metrics of an engine as a table: name -> kind, unit, help; and the buckets of the histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvpage.metrics import MetricKind

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_COUNT = (1, 2, 5, 10, 20)

HISTOGRAMS: Mapping[str, Sequence[float] | None] = {
    "time_to_first_token_seconds": _FIRST_TOKEN,
    "inter_token_latency_seconds": _TOKEN,
    "request_time_per_output_token_seconds": _TOKEN,
    "e2e_request_latency_seconds": _REQUEST,
    "request_queue_time_seconds": _REQUEST,
    "request_inference_time_seconds": _REQUEST,
    "request_prefill_time_seconds": _REQUEST,
    "request_decode_time_seconds": _REQUEST,
    "request_prompt_tokens": None,
    "request_generation_tokens": None,
    "request_max_num_generation_tokens": None,
    "request_params_n": _COUNT,
    "request_params_max_tokens": None,
    "request_num_preemptions": _COUNT,
    "request_prefill_kv_computed_tokens": None,
    "iteration_tokens_total": _ITERATION,
    "scheduler_step_seconds": _STEP,
}
"""Name -> bucket bounds; ``None`` = 1, 2, 5, 10 ... up to max_model_len. ``step_seconds`` has those of
``scheduler_step_seconds``."""

TEXTS: Mapping[str, tuple[MetricKind, str, str]] = {
    "num_requests_running": ("gauge", "sequences", "Sequences that run; a request with n choices has n."),
    "num_requests_waiting": ("gauge", "sequences", "Sequences that wait, preempted ones included."),
    "num_requests_waiting_by_reason": ("gauge", "sequences", "Sequences that wait, by what they wait for."),
    "kv_cache_usage_perc": ("gauge", "", "Share of the KV blocks that sequences hold, 0 to 1."),
    "kv_blocks": (
        "gauge",
        "blocks",
        "KV blocks by state: used (held by one sequence), shared (by several), cached (by none, but found again "
        "by what they hold), free (the rest).",
    ),
    "cache_config_info": ("gauge", "", "What the KV cache was made with, as labels; always 1."),
    "prompt_tokens": ("counter", "tokens", "Tokens of prompts that were computed or found in the cache."),
    "prompt_tokens_cached": ("counter", "tokens", "Those of them that the prefix cache had."),
    "prompt_tokens_by_source": ("counter", "tokens", "Prompt tokens by where their KV came from."),
    "generation_tokens": ("counter", "tokens", "Tokens generated."),
    "prefix_cache_queries": ("counter", "tokens", "Tokens looked for in the prefix cache."),
    "prefix_cache_hits": ("counter", "tokens", "Tokens found there."),
    "num_preemptions": ("counter", "", "Times a running sequence lost its blocks to one before it."),
    "request_success": (
        "counter",
        "requests",
        "Requests that ended, by reason; one with several choices counts once, as the worst of "
        "stop, length, abort, error.",
    ),
    "admission_rejections": ("counter", "requests", "Requests that the engine refused, by reason."),
    "kv_block_copies": ("counter", "blocks", "Blocks copied before a write because others held them too."),
    "kv_forks": ("counter", "sequences", "Choices split off from a computed prompt (n > 1)."),
    "time_to_first_token_seconds": ("histogram", "seconds", "From submission to the first token."),
    "inter_token_latency_seconds": ("histogram", "seconds", "Between two tokens of one choice."),
    "request_time_per_output_token_seconds": (
        "histogram",
        "seconds",
        "Decode time of a request by the tokens after the first of its longest choice.",
    ),
    "e2e_request_latency_seconds": ("histogram", "seconds", "From submission to the end of the request."),
    "request_queue_time_seconds": ("histogram", "seconds", "From submission to the first scheduled token."),
    "request_inference_time_seconds": (
        "histogram",
        "seconds",
        "From the first scheduled to the last generated token.",
    ),
    "request_prefill_time_seconds": (
        "histogram",
        "seconds",
        "From the first scheduled to the first generated token.",
    ),
    "request_decode_time_seconds": ("histogram", "seconds", "From the first to the last generated token."),
    "request_prompt_tokens": ("histogram", "tokens", "Prompt tokens of a request."),
    "request_generation_tokens": ("histogram", "tokens", "Tokens generated for a request, all choices."),
    "request_max_num_generation_tokens": (
        "histogram",
        "tokens",
        "Tokens of the longest choice of a request.",
    ),
    "request_params_n": ("histogram", "", "Choices that a request asked for."),
    "request_params_max_tokens": ("histogram", "tokens", "The max_tokens of a request that set it."),
    "request_num_preemptions": ("histogram", "", "Times a request was preempted."),
    "request_prefill_kv_computed_tokens": (
        "histogram",
        "tokens",
        "Prompt tokens that the cache did not have.",
    ),
    "iteration_tokens_total": (
        "histogram",
        "tokens",
        "Tokens a step brought: those it generated, and the prompts it completed.",
    ),
    "scheduler_step_seconds": ("histogram", "seconds", "Time of a step in the scheduler: plan and commit."),
    "step_seconds": ("histogram", "seconds", "Time of each phase of a step."),
}
