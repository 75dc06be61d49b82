"""kvpage, through its public API alone."""

from __future__ import annotations

import time
from typing import Any

from cpu_peers.serving import Answer, Job, LoadedEngine, serve
from cpu_peers.workloads import Workload

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}


class Kvpage(LoadedEngine):
    """An engine of the type's weights; 8 and 4 bits are made of the bfloat16 checkpoint while it loads."""

    def __init__(self, job: Job) -> None:
        import kvpage

        self._params = kvpage.SamplingParams
        self.version = kvpage.__version__
        self._engine = kvpage.Engine(
            str(job.find(*(("fp32", "bf16") if job.dtype == "fp32" else ("bf16",)))),
            device="cpu",
            dtype=DTYPES[job.dtype],
            quantization=job.dtype if job.dtype.startswith("int") else None,
            skip_tokenizer_init=True,
            max_model_len=job.max_tokens,
            allow_long_max_model_len=True,
            max_num_seqs=job.max_requests,
            kv_cache_memory="4GiB",
        )

    def details(self) -> dict[str, Any]:
        names = ("attention_backend", "decoder_backend", "block_size", "notes")
        return {name: getattr(self._engine.config, name) for name in names}

    def prepare(self, work: Workload) -> None:
        self._engine.reset_prefix_cache()

    def run(self, work: Workload) -> Answer:
        self._engine.reset_prefix_cache()
        began = time.perf_counter()
        handles = self._submit(work)
        first = None
        while self._engine.step():
            if first is None and handles[0].events():
                first = time.perf_counter() - began
        seconds = time.perf_counter() - began
        return Answer(seconds, sum(len(handle.result().outputs[0].token_ids) for handle in handles), first)

    def decode(self, work: Workload, steps: int) -> list[float]:
        self._engine.reset_prefix_cache()
        handles = self._submit(work)
        waiting = handles
        while waiting:
            self._engine.step()
            waiting = [handle for handle in waiting if not handle.events()]
        found = []
        while len(found) < steps and not any(handle.done for handle in handles):
            began = time.perf_counter()
            self._engine.step()
            found.append(time.perf_counter() - began)
        for handle in handles:
            handle.cancel()
        self._engine.step()
        return found

    def _submit(self, work: Workload) -> list[Any]:
        return [
            self._engine.submit(
                {"prompt_token_ids": request.prompt},
                self._params(temperature=0.0, max_tokens=request.new, ignore_eos=True, detokenize=False),
            )
            for request in work.requests
        ]


def import_torch() -> None:
    """What every host of kvpage has imported before it makes an engine."""
    import torch  # noqa: F401


if __name__ == "__main__":
    serve(Kvpage, imports=import_torch)
