"""Quantized checkpoints beside bfloat16 and int4 made while loading: speed of one stream and of 32, and memory.

    python benchmarks/quantized.py --source MODELS/M-bf16 --work QUANTIZED --rounds 5 --json RESULT.json
    python benchmarks/quantized.py --source MODELS/S-bf16 --work QUANTIZED --formats gptq-g128,nf4 --rounds 3

The source is a plain Llama in Hugging Face layout (make_model.py makes one); its quantized copies are written to --work
(quantized_models.py). Each runs in a process of its own, which is stopped while another one runs, and its turn comes once a
round, so that all meet the same state of the machine. New tokens a second are those after the first of every sequence. Head
and embedding of "int4" stay plain, as they do in the checkpoints of all formats but GGUF's. Memory is what the process holds
after the runs (VmRSS, VmHWM at its peak), the KV that was used and 256 MiB of the bandwidth's probe included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from cpu_peers.machine import describe
from quantized_models import FORMATS, make

PLAIN = ("bf16", "int4")
PROMPTS = {"one stream": (1, 128), "32 streams": (32, 64)}
"""Name of the workload -> sequences, tokens of each prompt."""


def serve(source: Path, work: Path, name: str, new: int) -> None:
    """The child: one workload's name in, one line of JSON out."""
    import torch

    from kvpage import Engine, SamplingParams
    from kvpage_cpu.native import Context

    path = source if name in PLAIN else make(source, work, name)
    chosen = (
        {"quantization": "int4", "quantization_config": {"quantize_head": False}} if name == "int4" else {}
    )
    begun = time.perf_counter()
    engine = Engine(path, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, kv_cache_memory="1GiB",
                    skip_tokenizer_init=True, **chosen)  # fmt: skip
    loaded = time.perf_counter() - begun
    context, memory = Context(threads=os.cpu_count() or 1), torch.zeros(256 << 20, dtype=torch.uint8)
    rng = random.Random(0)

    def run(count: int, length: int) -> tuple[float, float]:
        """Seconds until every sequence has its first token, and from there to the end."""
        engine.reset_prefix_cache()
        asked = SamplingParams(temperature=0.0, max_tokens=1 + new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        handles = [
            engine.submit({"prompt_token_ids": [rng.randrange(3, 30000) for _ in range(length)]}, asked)
            for _ in range(count)
        ]
        while not all(handle.output.outputs[0].token_ids for handle in handles):
            engine.step()
        first = time.perf_counter()
        while engine.step():
            pass
        return first - start, time.perf_counter() - first

    for count, length in PROMPTS.values():
        run(count, length)  # KV blocks and workspaces are touched for the first time here
    print("ready", flush=True)
    for line in sys.stdin:
        count, length = PROMPTS[line.strip()]
        bandwidth = context.read_bandwidth(memory)
        first, seconds = run(count, length)
        status = Path("/proc/self/status").read_text()
        sizes = {key: int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmHWM", "VmRSS")}
        answer = {"tokens_per_second": count * new / seconds, "prompts_per_second": count * length / first,
                  "load_seconds": loaded, "bandwidth": bandwidth, **sizes}  # fmt: skip
        print(json.dumps(answer), flush=True)


class Child:
    """One format in its own process; stopped but for its turn."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--serve", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("ready")
        self._process.send_signal(signal.SIGSTOP)

    def run(self, workload: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(workload + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line("{"))
        self._process.send_signal(signal.SIGSTOP)
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


def measure(given: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Every format, every workload, in rounds."""
    names = [*PLAIN, *given.formats.split(",")]
    for name in names[len(PLAIN) :]:
        make(given.source, given.work, name)
    children = {}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
    try:
        for name in names:
            children[name] = Child(name, arguments)
        for number in range(given.rounds):
            for workload in PROMPTS:
                for name, child in children.items():
                    found = child.run(workload)
                    runs[name].setdefault(workload, []).append(found)
                    print(f"round {number}: {workload:12} {name:20} {found['tokens_per_second']:8.1f} new tokens/s, "
                          f"{found['VmRSS'] / 2**20:6.0f} MiB", flush=True)  # fmt: skip
            keep(given, runs)
    finally:
        for child in children.values():
            child.close()
    return {name: summary(given, name, runs) for name in names}


def keep(given: argparse.Namespace, runs: dict[str, Any]) -> None:
    """What was measured up to this round, where a file was named for it."""
    if given.json:
        result = {"date": date.today().isoformat(), "machine": describe(), "source": given.source.name,
                  "new_tokens": given.tokens, "runs": runs,
                  "summary": {name: summary(given, name, runs) for name in runs}}  # fmt: skip
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def summary(given: argparse.Namespace, name: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Medians of speeds, and of their ratios to bfloat16 and to int4 in the same round."""
    path = given.source if name in PLAIN else make(given.source, given.work, name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    last = runs[name]["32 streams"][-1]
    found: dict[str, Any] = {
        "file_bytes": sum(file.stat().st_size for file in files) if name != "int4" else None,
        "load_seconds": last["load_seconds"],
        "peak_bytes": last["VmHWM"],
        "resident_bytes": last["VmRSS"],
    }
    for workload in PROMPTS:
        speeds = [run["tokens_per_second"] for run in runs[name][workload]]
        found[workload] = {"new_tokens_per_second": round(statistics.median(speeds), 1)}
        for other in PLAIN:
            others = [run["tokens_per_second"] for run in runs[other][workload]]
            ratio = statistics.median(a / b for a, b in zip(speeds, others, strict=True))
            found[workload][f"over {other}"] = round(ratio, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where quantized copies are kept")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help="run one format only, driven through stdin")
    given = parser.parse_args()
    if given.serve:
        serve(given.source, given.work, given.serve, given.tokens)
        return
    print(json.dumps(measure(given, sys.argv[1:]), indent=1))


if __name__ == "__main__":
    main()
