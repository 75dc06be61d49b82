"""llama.cpp through llama-cpp-python's bindings of its C API: continuous batching over ``llama_decode``.

8 bits are q8_0, 4 bits q4_0. Its own loop shares a prefix that is computed once and copied to each sequence.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from cpu_peers.serving import Answer, Job, LoadedEngine, serve
from cpu_peers.workloads import Request, Workload

KINDS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
BATCH = 2048
MICRO_BATCH = 512
silent = llama_cpp.llama_log_callback(lambda *_: None)


@dataclass
class Sequence:
    """A request on its way: ``computed`` prompt tokens, then ``made`` new ones, the last of them ``token``."""

    number: int
    request: Request
    computed: int
    made: int = 0
    token: int = 0

    @property
    def filled(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.computed == len(self.request.prompt)


class LlamaCpp(LoadedEngine):
    """One model, and one context that is made anew where a workload needs another shape of it."""

    def __init__(self, job: Job) -> None:
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        path = job.find(f"{KINDS[job.dtype]}.gguf")
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._threads = job.threads
        self._context: Any = None
        self._shape: tuple[int, int, bool] | None = None
        self._use(4096, 1, False)

    def prepare(self, work: Workload) -> None:
        count = len(work.requests)
        if count == 1:
            self._use(4096, 1, False)
        elif work.shared:
            self._use(4096 + 2048, count + 1, True)
        else:
            self._use(count * 512, count, False)

    def run(self, work: Workload) -> Answer:
        llama_cpp.llama_memory_clear(self._memory, False)
        began = time.perf_counter()
        if work.shared:
            self._share(work)
        one_by_one = len(work.requests) > self._sequences
        groups = [[request] for request in work.requests] if one_by_one else [list(work.requests)]
        tokens, first = 0, None
        for group in groups:
            made, moment = self._complete(group, work.shared)
            tokens += made
            first = first or moment - began
        return Answer(time.perf_counter() - began, tokens, first)

    def _use(self, tokens: int, sequences: int, unified: bool) -> None:
        if self._shape == (tokens, sequences, unified):
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = tokens, sequences, unified
        settings.n_batch, settings.n_ubatch = BATCH, MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp gives no context of {tokens} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._shape, self._sequences = (tokens, sequences, unified), sequences

    def _share(self, work: Workload) -> None:
        """Compute the prefix as a sequence of its own and give a copy to each."""
        last = len(work.requests)
        prefix = work.requests[0].prompt[: work.shared]
        self._step([(token, place, last, place == len(prefix) - 1) for place, token in enumerate(prefix)])
        for number in range(last):
            llama_cpp.llama_memory_seq_cp(self._memory, last, number, -1, -1)

    def _complete(self, requests: list[Request], start: int) -> tuple[int, float]:
        live = [Sequence(number, request, start) for number, request in enumerate(requests)]
        tokens, first = 0, 0.0
        while live:
            items: list[tuple[int, int, int, bool]] = []
            sampled = []
            for sequence in sorted(live, key=lambda each: not each.filled):  # decodes first
                if self._add(sequence, items):
                    sampled.append(sequence)
            for sequence, token in zip(sampled, self._step(items), strict=True):
                sequence.token, sequence.made = token, sequence.made + 1
                tokens += 1
                if sequence.made == sequence.request.new:
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence.number, -1, -1)
                    live.remove(sequence)
            first = first or time.perf_counter()
        return tokens, first

    def _add(self, sequence: Sequence, items: list[tuple[int, int, int, bool]]) -> bool:
        """Put what fits of a sequence into the batch; whether its next token comes out of it."""
        room = BATCH - len(items)
        prompt = sequence.request.prompt
        if sequence.filled:
            if room:
                items.append((sequence.token, len(prompt) + sequence.made - 1, sequence.number, True))
            return room > 0
        end = min(len(prompt), sequence.computed + room)
        for place in range(sequence.computed, end):
            items.append((prompt[place], place, sequence.number, place == len(prompt) - 1))
        sequence.computed = end
        return sequence.filled

    def _step(self, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """One ``llama_decode`` of (token, position, sequence, sampled); the likeliest token of each sampled one."""
        batch = self._batch
        for index, (token, place, number, sampled) in enumerate(items):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = sampled
        batch.n_tokens = len(items)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        return [int(self._logits(index).argmax()) for index, (*_, sampled) in enumerate(items) if sampled]

    def _logits(self, index: int) -> Any:
        row = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(row, shape=(self._vocabulary,))


if __name__ == "__main__":
    serve(LlamaCpp)
