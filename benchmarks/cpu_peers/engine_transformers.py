"""transformers' ``generate``: one left-padded batch to its longest request; only the tokens asked for are counted."""

from __future__ import annotations

import time
from typing import Any

from cpu_peers.engine_kvpage import import_torch
from cpu_peers.serving import Answer, Job, LoadedEngine, serve
from cpu_peers.workloads import Workload

PADDING = 2


class Transformers(LoadedEngine):
    """The model with torch's scaled dot product attention and a cache of its own for each call."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        if job.dtype not in {"fp32", "bf16"}:
            raise SystemExit(f"transformers runs here in fp32 and bf16, not in {job.dtype}")
        self.version = transformers.__version__
        transformers.logging.set_verbosity_error()
        dtype = torch.float32 if job.dtype == "fp32" else torch.bfloat16
        path = job.find(job.dtype, "bf16")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
        self._model = loaded.eval()

    def run(self, work: Workload) -> Answer:
        import torch

        width = max(len(request.prompt) for request in work.requests)
        padded = [[PADDING] * (width - len(each.prompt)) + list(each.prompt) for each in work.requests]
        mask = [[0] * (width - len(each.prompt)) + [1] * len(each.prompt) for each in work.requests]
        new = max(request.new for request in work.requests)
        arrivals = Arrivals()
        began = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=PADDING,
                streamer=arrivals if len(work.requests) == 1 else None,
            )
        seconds = time.perf_counter() - began
        first = arrivals.moments[1] - began if arrivals.moments else None
        return Answer(seconds, work.new_tokens, first)


class Arrivals:
    """A streamer that keeps when tokens came; the prompt comes first."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        """A token, or at first the prompt."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """The last one has come."""


if __name__ == "__main__":
    serve(Transformers, imports=import_torch)
