"""From the answers of ``kvpage bench serve`` to vLLM's result: its JSON keys, and the text it prints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvpage.cli.percentiles import percentile
from kvpage.cli.serve_load import Answer

METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
"""What percentiles are given of -> its short and its long name."""
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")
"""Keys with a value a request, kept where --save-detailed asks."""
WIDTH = 50


def count_tokens(answer: Answer, count: Callable[[str], int] | None) -> int:
    """Tokens of an answer: as the server counts, else by the tokenizer at hand, else its chunks."""
    if not answer.success:
        return 0
    if answer.output_tokens:
        return answer.output_tokens
    return count(answer.text) if count is not None else 1 + len(answer.itl)


def time_per_token(answer: Answer, tokens: int) -> float:
    """Seconds a token after the first; 0 for one token."""
    return (answer.latency - answer.ttft) / (tokens - 1) if tokens > 1 else 0.0


def result_of(
    answers: Sequence[Answer],
    seconds: float,
    *,
    count: Callable[[str], int] | None,
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """vLLM's keys but those of percentiles. ``goodput``: metric -> most milliseconds of a good request."""
    tokens = [count_tokens(answer, count) for answer in answers]
    done = [(answer, number) for answer, number in zip(answers, tokens, strict=True) if answer.success]
    total_input, total_output = sum(answer.prompt_len for answer, _ in done), sum(tokens)
    good = sum(_is_good(answer, number, goodput) for answer, number in done)
    peak_tokens, peak_requests = _peaks([answer for answer, _ in done])
    return {
        "duration": seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(done) / seconds,
        "request_goodput": good / seconds if goodput else None,
        "output_throughput": total_output / seconds,
        "total_token_throughput": (total_input + total_output) / seconds,
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": tokens,
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "latencies": [answer.latency for answer in answers],
        "start_times": [answer.start_time for answer in answers],
        "queue_times": [answer.queue_time for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }


def series_of(answers: Sequence[Answer], tokens: Sequence[int]) -> dict[str, list[float]]:
    """Metric -> seconds, one a successful request; of "itl" one a gap."""
    done = [(answer, number) for answer, number in zip(answers, tokens, strict=True) if answer.success]
    return {
        "ttft": [answer.ttft for answer, _ in done],
        "tpot": [time_per_token(answer, number) for answer, number in done if number > 1],
        "itl": [gap for answer, _ in done for gap in answer.itl],
        "e2el": [answer.latency for answer, _ in done],
        "client_queue_time": [answer.queue_time for answer, _ in done],
        "e2el_including_client_queue": [answer.latency + answer.queue_time for answer, _ in done],
    }


def spread_of(
    series: Mapping[str, Sequence[float]], metrics: Sequence[str], percents: Sequence[float]
) -> dict[str, float]:
    """mean, median, std and percentiles in milliseconds under vLLM's keys ("p99_ttft_ms"), in its order."""
    keys: dict[str, float] = {}
    for name in METRICS:
        if name in metrics:
            values = [1000 * value for value in series[name]] or [0.0]
            keys[f"mean_{name}_ms"] = statistics.fmean(values)
            keys[f"median_{name}_ms"] = statistics.median(values)
            keys[f"std_{name}_ms"] = statistics.pstdev(values)
            for percent in percents:
                keys[f"p{percent:g}_{name}_ms"] = percentile(values, percent)
    return keys


def as_text(
    result: Mapping[str, Any], metrics: Sequence[str], percents: Sequence[float], settings: Mapping[str, Any]
) -> str:
    """The lines that vLLM prints; scripts read them."""

    def line(name: str, value: object) -> str:
        return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value!s:<10}"

    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        line("Successful requests:", result["completed"]),
        line("Failed requests:", result["failed"]),
    ]
    if settings["max_concurrency"] is not None:
        lines.append(line("Maximum request concurrency:", settings["max_concurrency"]))
    if not math.isinf(settings["request_rate"]):
        lines.append(line("Request rate configured (RPS):", settings["request_rate"]))
    lines += [
        line("Benchmark duration (s):", result["duration"]),
        line("Total input tokens:", result["total_input_tokens"]),
        line("Total generated tokens:", result["total_output_tokens"]),
        line("Request throughput (req/s):", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        lines.append(line("Request goodput (req/s):", result["request_goodput"]))
    lines += [
        line("Output token throughput (tok/s):", result["output_throughput"]),
        line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        line("Peak concurrent requests:", float(result["max_concurrent_requests"])),
        line("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    for name, (short, long) in METRICS.items():
        if name in metrics:
            lines += [f"{long:-^{WIDTH}}", line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])]
            lines.append(line(f"Median {short} (ms):", result[f"median_{name}_ms"]))
            lines += [
                line(f"P{percent:g} {short} (ms):", result[f"p{percent:g}_{name}_ms"]) for percent in percents
            ]
    return "\n".join([*lines, "=" * WIDTH])


def _is_good(answer: Answer, tokens: int, goodput: Mapping[str, float]) -> bool:
    seconds = {"ttft": answer.ttft, "tpot": time_per_token(answer, tokens), "e2el": answer.latency}
    return all(1000 * seconds[name] <= most for name, most in goodput.items())


def _peaks(done: Sequence[Answer]) -> tuple[float, int]:
    """Most tokens (chunks, as vLLM counts) and most requests of one second of the run."""
    if not done:
        return 0.0, 0
    began = min(answer.start_time for answer in done)
    seconds = math.ceil(max(answer.start_time + answer.latency for answer in done) - began) + 1
    tokens, requests = [0] * seconds, [0] * seconds
    for answer in done:
        moment = answer.start_time + answer.ttft - began
        for gap in (0.0, *answer.itl):
            moment += gap
            tokens[min(int(moment), seconds - 1)] += 1
        first, last = answer.start_time - began, answer.start_time + answer.latency - began
        for second in range(int(first), int(last) + 1):
            requests[second] += 1
    return float(max(tokens)), max(requests)
