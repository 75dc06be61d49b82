"""vLLM's CPU build as its CPU page advises: threads bound, compiled, not eager (cpu.py sets its environment).

8 bits are W8A8 (per-channel weights, per-token activations), 4 bits W4A16 in groups of 128, both as compressed-tensors.
"""

from __future__ import annotations

import time

import vllm

from cpu_peers.serving import Answer, Job, LoadedEngine, serve
from cpu_peers.workloads import Request, Workload

KINDS = {"fp32": ("fp32", "bf16"), "bf16": ("bf16",), "int8": ("vllm-int8",), "int4": ("vllm-int4",)}


class Vllm(LoadedEngine):
    """The offline engine with prefix caching; its cache is emptied before each run."""

    def __init__(self, job: Job) -> None:
        self.version = vllm.__version__
        self._engine = vllm.LLM(
            str(job.find(*KINDS[job.dtype])),
            dtype="float32" if job.dtype == "fp32" else "bfloat16",
            skip_tokenizer_init=True,
            max_model_len=job.max_tokens,
            max_num_seqs=job.max_requests,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )

    def run(self, work: Workload) -> Answer:
        """Where one request runs alone, its first token is timed by the same request for one token, before."""
        first = None
        if len(work.requests) == 1 and work.new_tokens > 1:
            first, _ = self._complete([Request(work.requests[0].prompt, 1)])
        seconds, tokens = self._complete(list(work.requests))
        return Answer(seconds, tokens, first)

    def _complete(self, requests: list[Request]) -> tuple[float, int]:
        self._engine.reset_prefix_cache()
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        params = [
            vllm.SamplingParams(temperature=0.0, max_tokens=request.new, ignore_eos=True, detokenize=False)
            for request in requests
        ]
        began = time.perf_counter()
        outputs = self._engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(Vllm)
