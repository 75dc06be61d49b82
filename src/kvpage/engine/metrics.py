"""EngineMetrics: what one engine counts while it steps, and the snapshot made of it.

Of the contract's names those are left out whose feature does not exist: engine_sleep_state, lora_requests_info,
external_prefix_cache_* and mm_cache_*, spec_decode_*, corrupted_requests, swap_blocks (nothing sleeps, adapts, is
fetched, drafted or swapped), the reason "deferred" of waiting requests (all wait for capacity), and kv_block_lifetime,
idle_before_evict and reuse_gap (opt-in there; they would need the time of every block).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from kvpage.cache.manager import BlockManager
from kvpage.engine.metrics_text import HISTOGRAMS, TEXTS
from kvpage.engine.request import AnyState
from kvpage.errors import QueueFullError, RequestError, TooLongError
from kvpage.metrics import HistogramValue, MetricFamily, MetricSample, MetricsSnapshot
from kvpage.outputs import FinishReason
from kvpage.params import SamplingParams
from kvpage.sched.scheduler import Scheduler

REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
PHASES = ("schedule", "execute", "commit", "deliver")


class Histogram:
    """Counts observations by size; one thread writes."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """``times`` observations of ``value``; a bound belongs to the bucket that it ends."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def freeze(self) -> HistogramValue:
        """As plain data."""
        return HistogramValue(self.bounds, tuple(self.counts), self.total)


class EngineMetrics:
    """The counters and histograms of one engine, written on the thread that steps it.

    Args:
        max_model_len: where the buckets of token counts end.
        info: labels of ``cache_config_info``.
    """

    def __init__(self, max_model_len: int, info: Mapping[str, str]) -> None:
        self._info = dict(info)
        self._histograms = {
            name: Histogram(one_two_five(max_model_len) if bounds is None else bounds)
            for name, bounds in HISTOGRAMS.items()
        }
        self._phases = {phase: Histogram(HISTOGRAMS["scheduler_step_seconds"] or ()) for phase in PHASES}
        self._finished = dict.fromkeys(REASONS, 0)
        self._rejections = {"queue_full": 0, "too_long": 0, "invalid": 0}
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._counted_prompt_tokens = 0  # of the two, what ``iteration_tokens_total`` has seen
        self._counted_generated_tokens = 0

    # ---- what happens -----------------------------------------------------------------------------------

    def rejected(self, error: RequestError) -> None:
        """A request was refused at admission."""
        kinds = {QueueFullError: "queue_full", TooLongError: "too_long"}
        self._rejections[kinds.get(type(error), "invalid")] += 1

    def prompt_computed(self, state: AnyState, now: float) -> None:
        """The first token of a request came, or its vector."""
        request = state.request
        self._prompt_tokens += len(request.prompt_token_ids)
        self._cached_tokens += request.cached_tokens
        if isinstance(request.params, SamplingParams):
            self._histograms["time_to_first_token_seconds"].observe(now - request.arrival)

    def tokens(self, since: Mapping[float, int], count: int, now: float) -> None:
        """A step brought ``count`` tokens at ``now``. ``since``: when their choices had gained the one before (0.0 =
        never) -> how many of them."""
        self._generated_tokens += count
        gaps = self._histograms["inter_token_latency_seconds"]
        for before, times in since.items():
            if before:
                gaps.observe(now - before, times)

    def finished(self, state: AnyState) -> None:
        """A request ended, in whatever way; what it never reached is not observed."""
        request, metrics, observe = state.request, state.output.metrics, self._observe
        endings = [state.ending(index) for index in range(request.params.n)]
        # One reason for a request with several choices: the one that says most of what went wrong.
        reason = max((reason for reason, _ in endings if reason is not None), key=REASONS.index)
        generated = [tokens for _, tokens in endings]
        prompt = len(request.prompt_token_ids)
        self._finished[reason] += 1
        observe("e2e_request_latency_seconds", time.monotonic() - request.arrival)
        observe("request_prompt_tokens", prompt)
        observe("request_num_preemptions", request.preemptions)
        if isinstance(request.params, SamplingParams):
            observe("request_generation_tokens", sum(generated))
            observe("request_max_num_generation_tokens", max(generated))
            observe("request_params_n", request.params.n)
            if request.params.max_tokens is not None:
                observe("request_params_max_tokens", request.params.max_tokens)
        if metrics.queued is not None:
            observe("request_queue_time_seconds", metrics.queued)
        if metrics.prefill is not None:
            observe("request_prefill_time_seconds", metrics.prefill)
            observe("request_inference_time_seconds", metrics.prefill + (metrics.decode or 0.0))
            observe("request_prefill_kv_computed_tokens", prompt - request.cached_tokens)
        if metrics.decode is not None:
            observe("request_decode_time_seconds", metrics.decode)
            if max(generated) > 1:
                observe("request_time_per_output_token_seconds", metrics.decode / (max(generated) - 1))

    def step(
        self, began: float, scheduled: float, executed: float, committed: float, delivered: float
    ) -> None:
        """A step was committed; ``time.perf_counter()`` before it and after each of its phases."""
        phases = self._phases
        phases["schedule"].observe(scheduled - began)
        phases["execute"].observe(executed - scheduled)
        phases["commit"].observe(committed - executed)
        phases["deliver"].observe(delivered - committed)
        histograms = self._histograms
        histograms["scheduler_step_seconds"].observe(scheduled - began + committed - executed)
        prompt, generated = self._prompt_tokens, self._generated_tokens
        histograms["iteration_tokens_total"].observe(
            prompt - self._counted_prompt_tokens + generated - self._counted_generated_tokens
        )
        self._counted_prompt_tokens, self._counted_generated_tokens = prompt, generated

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    # ---- the snapshot -----------------------------------------------------------------------------------

    def snapshot(self, scheduler: Scheduler, blocks: BlockManager) -> MetricsSnapshot:
        """Everything at this moment."""
        families = [
            *self._gauges(scheduler, blocks),
            *self._counters(scheduler, blocks),
            *(_family(name, [({}, value.freeze())]) for name, value in self._histograms.items()),
            _family("step_seconds", [({"phase": p}, value.freeze()) for p, value in self._phases.items()]),
        ]
        return MetricsSnapshot(time.time(), tuple(families))

    def _gauges(self, scheduler: Scheduler, blocks: BlockManager) -> list[MetricFamily]:
        waiting, usable = scheduler.num_waiting, blocks.usable_blocks
        return [
            _family("num_requests_running", [({}, scheduler.num_running)]),
            _family("num_requests_waiting", [({}, waiting)]),
            _family("num_requests_waiting_by_reason", [({"reason": "capacity"}, waiting)]),
            _family("kv_cache_usage_perc", [({}, blocks.used_blocks / usable if usable else 0.0)]),
            _family("kv_blocks", [({"state": s}, count) for s, count in blocks.count_by_state().items()]),
            _family("cache_config_info", [(self._info, 1)]),
        ]

    def _counters(self, scheduler: Scheduler, blocks: BlockManager) -> list[MetricFamily]:
        computed = self._prompt_tokens - self._cached_tokens
        sources = {"local_compute": computed, "local_cache_hit": self._cached_tokens}
        return [
            _family("prompt_tokens", [({}, self._prompt_tokens)]),
            _family("prompt_tokens_cached", [({}, self._cached_tokens)]),
            _family("prompt_tokens_by_source", [({"source": s}, count) for s, count in sources.items()]),
            _family("generation_tokens", [({}, self._generated_tokens)]),
            _family("prefix_cache_queries", [({}, blocks.queries)]),
            _family("prefix_cache_hits", [({}, blocks.hits)]),
            _family("num_preemptions", [({}, scheduler.preemptions)]),
            _family("request_success", [({"finished_reason": r}, n) for r, n in self._finished.items()]),
            _family("admission_rejections", [({"reason": r}, n) for r, n in self._rejections.items()]),
            _family("kv_block_copies", [({}, blocks.copies)]),
            _family("kv_forks", [({}, blocks.forks)]),
        ]


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to ``most``."""
    bounds: list[int] = []
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power > most:
                return bounds
            bounds.append(step * power)
        power *= 10


def _family(name: str, samples: Sequence[tuple[Mapping[str, str], float | HistogramValue]]) -> MetricFamily:
    kind, unit, text = TEXTS[name]
    return MetricFamily(
        name,
        kind,
        text,
        unit,
        tuple(samples[0][0]),
        tuple(MetricSample(labels, value) for labels, value in samples),
    )
