"""The load of ``kvpage bench serve``: requests sent when they are due, and what a client sees of each answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpage.cli.remote import DONE, EventReader, RemoteError, http_library, read_event, status_text

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request: its text, the tokens it has by the tokenizer at hand, and the tokens it asks for."""

    prompt: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where requests go, and what they all have in common.

    Attributes:
        chat: the endpoint takes messages instead of a prompt.
        body: fields added to every request, over those made here.
    """

    url: str
    chat: bool
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None

    def payload(self, sample: Sample) -> dict[str, Any]:
        """The request as ``vllm bench serve`` sends it."""
        common = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            asked: dict[str, Any] = {
                "messages": [{"role": "user", "content": sample.prompt}],
                "max_completion_tokens": sample.output_len,
                **({} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}),
            }
        else:
            asked = {
                "prompt": sample.prompt,
                "max_tokens": sample.output_len,
                "repetition_penalty": 1.0,
                "logprobs": self.logprobs,
            }
        ignore = {"ignore_eos": True} if self.ignore_eos else {}
        return {**common, **asked, **ignore, **self.body}


@dataclass(kw_only=True, slots=True)
class Answer:
    """What came back. Times in seconds; ``start_time`` by the clock of ``time.perf_counter``.

    Attributes:
        ttft: to the first token. itl: between chunks that carry tokens. latency: to the last one.
        queue_time: from when the request was due until it was sent, held back by the limit of concurrency.
        output_tokens: as the server counts, 0 where it does not.
    """

    prompt_len: int
    success: bool = False
    text: str = ""
    output_tokens: int = 0
    start_time: float = 0.0
    queue_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str = ""

    def take(self, chunk: Mapping[str, Any], now: float, *, chat: bool) -> None:
        """Count one chunk that arrived ``now``."""
        if usage := chunk.get("usage"):
            self.output_tokens = usage.get("completion_tokens") or self.output_tokens
            self.prompt_len = usage.get("prompt_tokens") or self.prompt_len
        for choice in chunk.get("choices") or ():
            delta = (choice.get("delta") or {}) if chat else choice
            text = delta.get("content" if chat else "text") or ""
            thought = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
            # A role alone is no token, nor is a reason to finish; a completion's token may have no text.
            if text or thought or not (chat or choice.get("finish_reason")):
                since = now - self.start_time
                if self.success:
                    self.itl.append(since - self.latency)
                else:
                    self.success, self.ttft = True, since
                self.latency = since
                self.text += text


async def ask(client: httpx.AsyncClient, target: Target, sample: Sample, request_id: str) -> Answer:
    """Send one request and read its stream; whatever goes wrong stands in ``error``."""
    answer = Answer(prompt_len=sample.prompt_len)
    reader = EventReader()
    headers = {**target.headers, "x-request-id": request_id}
    answer.start_time = time.perf_counter()
    try:
        async with client.stream(
            "POST", target.url, json=target.payload(sample), headers=headers
        ) as response:
            if response.status_code != 200:
                answer.error = status_text(response.status_code, await response.aread())
                return answer
            async for piece in response.aiter_bytes():
                now = time.perf_counter()
                for data in reader.push(piece):
                    if data != DONE:
                        answer.take(read_event(data), now, chat=target.chat)
        if not answer.success:
            answer.error = "the stream ended without a token"
    except (http_library().HTTPError, RemoteError) as error:
        answer.success, answer.error = False, f"{type(error).__name__}: {error}"
    return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """When requests are due.

    Attributes:
        rate: requests a second, or infinity: all at once.
        burstiness: shape of the gamma distribution that the gaps follow: 1 = a Poisson process, less = in bursts,
            more = evenly, infinity = exactly so.
        ramp_up: "linear" or "exponential": the rate goes from ``start_rps`` to ``end_rps`` instead.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp_up: str | None = None
    start_rps: float = 0.0
    end_rps: float = 0.0

    def rate_at(self, index: int, count: int) -> float:
        """Requests a second when the request of this index is due."""
        progress = index / max(count - 1, 1)
        if self.ramp_up == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        if self.ramp_up == "exponential":
            return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)
        return self.rate

    def times(self, count: int, numbers: random.Random) -> list[float]:
        """Seconds from the start at which each request is due."""
        due, times = 0.0, []
        for index in range(count):
            rate = self.rate_at(index, count)
            if math.isinf(rate):
                times.append(0.0)
                continue
            even = math.isinf(self.burstiness)
            scale = 1.0 if even else 1.0 / (rate * self.burstiness)
            due += 1.0 / rate if even else numbers.gammavariate(self.burstiness, scale)
            times.append(due)
        if self.ramp_up is None and due > 0:
            # The sum of random gaps is off by a few percent; vLLM takes that out, so that rates compare.
            times = [time * (count / self.rate) / due for time in times]
        return times


async def run_load(
    client: httpx.AsyncClient,
    target: Target,
    samples: Sequence[Sample],
    due: Sequence[float],
    *,
    max_concurrency: int | None,
    request_id_prefix: str,
    on_answer: Callable[[], None] = lambda: None,
) -> tuple[list[Answer], float]:
    """Send every request when it is due; the answers in order, and the seconds that all took."""
    limit: contextlib.AbstractAsyncContextManager[Any] = (
        asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    )

    async def one(index: int, sample: Sample) -> Answer:
        arrived = time.perf_counter()
        async with limit:
            answer = await ask(client, target, sample, f"{request_id_prefix}{index}")
        answer.queue_time = answer.start_time - arrived
        on_answer()
        return answer

    began = time.perf_counter()
    tasks = []
    for index, (sample, moment) in enumerate(zip(samples, due, strict=True)):
        wait = began + moment - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(index, sample)))
    answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - began


async def until_ready(client: httpx.AsyncClient, target: Target, sample: Sample, seconds: float) -> None:
    """Ask ``sample`` until it is answered.

    Raises:
        RemoteError: it was not within ``seconds``.
    """
    deadline = time.perf_counter() + seconds
    while True:
        answer = await ask(client, target, sample, "ready-check")
        left = deadline - time.perf_counter()
        if answer.success:
            return
        if left <= 0:
            raise RemoteError(f"{target.url} was not ready within {seconds:g} s: {answer.error}")
        await asyncio.sleep(min(1.0, left))
