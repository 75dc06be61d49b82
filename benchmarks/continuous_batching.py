"""Throughput of kvpage's reference backend beside transformers' own continuous batching, on the same requests.

    python benchmarks/make_model.py --out /tmp/S
    python benchmarks/continuous_batching.py --model /tmp/S --rounds 3 --json benchmarks/results/NAME.json

Each engine runs in a process of its own that loads the model once and answers one request batch a round; the
rounds alternate, so a drift of the machine's speed meets both. Greedy, EOS ignored, float32. Printed: new tokens
a second of each, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Requests = list[tuple[list[int], int]]
Run = Callable[[Requests], tuple[float, int]]


def requests(count: int, vocab_size: int, seed: int = 0) -> Requests:
    """(prompt, new tokens): prompts of 32-256 tokens, 64-192 new ones."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, vocab_size) for _ in range(rng.randint(32, 256))], rng.randint(64, 192))
        for _ in range(count)
    ]


def kvpage_runner(model: str, threads: int, concurrency: int) -> Run:
    import torch

    import kvpage

    torch.set_num_threads(threads)
    engine = kvpage.Engine(
        model, dtype="float32", skip_tokenizer_init=True, max_num_seqs=concurrency, kv_cache_memory="2GiB",
        attention_backend="reference",
    )  # fmt: skip

    def run(work: Requests) -> tuple[float, int]:
        engine.reset_prefix_cache()
        began = time.perf_counter()
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in work],
            [kvpage.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True) for _, new in work],
            progress=False,
        )
        return time.perf_counter() - began, sum(len(o.outputs[0].token_ids) for o in outputs)

    return run


def transformers_runner(model: str, threads: int, concurrency: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    manager = loaded.init_continuous_batching(
        generation_config=GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=2, max_new_tokens=192
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=96, max_batch_tokens=2048),
    )
    manager.start()

    def run(work: Requests) -> tuple[float, int]:
        began = time.perf_counter()
        for prompt, new in work:
            manager.add_request(prompt, max_new_tokens=new)
        tokens = done = 0
        while done < len(work):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
                tokens += len(result.generated_tokens)
        return time.perf_counter() - began, tokens

    return run


RUNNERS: dict[str, Callable[[str, int, int], Run]] = {
    "kvpage": kvpage_runner,
    "transformers": transformers_runner,
}


def serve(engine: str, options: argparse.Namespace) -> None:
    """The child: one line in, one timed batch, one line out."""
    work = requests(options.requests, options.vocab_size)
    run = RUNNERS[engine](options.model, options.threads, options.requests)
    run([(prompt[:16], 4) for prompt, _ in work])
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds, tokens = run(work)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Child:
    """One engine in its own process."""

    def __init__(self, engine: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--engine", engine]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("ready")

    def round(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line("{"))
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, prefix: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line
        raise RuntimeError("the engine's process ended; see its error above")


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    children = {engine: Child(engine, arguments) for engine in RUNNERS}
    speeds: dict[str, list[float]] = {engine: [] for engine in RUNNERS}
    try:
        for number in range(options.rounds):
            for engine, child in children.items():
                found = child.round()
                speeds[engine].append(found["tokens"] / found["seconds"])
                print(f"round {number}: {engine} {speeds[engine][-1]:.1f} new tokens/s", flush=True)
    finally:
        for child in children.values():
            child.close()
    ratios = [a / b for a, b in zip(speeds["kvpage"], speeds["transformers"], strict=True)]
    return {
        "requests": options.requests,
        "threads": options.threads,
        "new_tokens_per_second": {engine: statistics.median(found) for engine, found in speeds.items()},
        "rounds": speeds,
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=[*RUNNERS], help="run one engine only, driven through stdin")
    options = parser.parse_args()
    if options.engine:
        serve(options.engine, options)
        return
    result = compare(options, sys.argv[1:])
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
