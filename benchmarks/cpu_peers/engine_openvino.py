"""OpenVINO GenAI's ContinuousBatchingPipeline, arithmetic in bfloat16 as it chooses itself where the CPU has it.

A burst of new requests does not share a prefix there, so workload c sends the prefix first, as a request of its own
that is timed too: the faster of the two ways.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from cpu_peers.serving import Answer, Job, LoadedEngine, serve
from cpu_peers.workloads import Request, Workload

KINDS = {"fp32": "ov-fp32", "bf16": "ov-fp16", "int8": "ov-int8", "int4": "ov-int4"}


class OpenVino(LoadedEngine):
    """A pipeline; one with prefix caching, and an empty cache, is made anew before each run that shares a prefix."""

    def __init__(self, job: Job) -> None:
        self.version = openvino_genai.__version__
        self._job = job
        self._path = str(job.find(KINDS[job.dtype]))
        self._pipeline = self._make(caching=False)
        self._caching = False

    def prepare(self, work: Workload) -> None:
        caching = work.shared > 0
        if caching or self._caching:
            del self._pipeline
            self._pipeline = self._make(caching)
            self._caching = caching

    def run(self, work: Workload) -> Answer:
        began = time.perf_counter()
        if work.shared:
            self._complete([Request(work.requests[0].prompt[: work.shared], 1)])
        tokens, first = self._complete(list(work.requests))
        seconds = time.perf_counter() - began
        return Answer(seconds, tokens, None if first is None else first - began)

    def _make(self, caching: bool) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = self._job.max_requests
        scheduler.cache_size = 2
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = caching
        properties = {
            "INFERENCE_PRECISION_HINT": "f32" if self._job.dtype == "fp32" else "bf16",
            "INFERENCE_NUM_THREADS": self._job.threads,
            "NUM_STREAMS": 1,
        }
        return openvino_genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", properties)

    def _complete(self, requests: list[Request]) -> tuple[int, float | None]:
        prompts = [openvino.Tensor(np.array([request.prompt], dtype=np.int64)) for request in requests]
        handles = [
            self._pipeline.add_request(number, prompt, _settings(request.new))
            for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]
        first = None
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if first is None and handles[0].can_read():
                first = time.perf_counter()
        return sum(len(found.generated_ids) for handle in handles for found in handle.read_all()), first


def _settings(new: int) -> Any:
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = new
    settings.ignore_eos = True
    settings.do_sample = False
    settings.eos_token_id = 2
    return settings


if __name__ == "__main__":
    serve(OpenVino)
