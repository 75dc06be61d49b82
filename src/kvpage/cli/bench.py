"""``kvpage bench throughput|latency|serve``: vLLM's flags and result keys."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvpage.cli import bench_serve
from kvpage.cli.collect_env import environment
from kvpage.cli.main import OK
from kvpage.cli.percentiles import percentile
from kvpage.cli.session import Stopwatch, check_output, open_engine, write_file
from kvpage.cli.signals import undivided
from kvpage.cli.workload import has_tokenizer, random_prompts, vocabulary_size
from kvpage.flags.engine import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.flags.parser import CommandParser, UsageError, check_at_least, human_integer
from kvpage.outputs import RequestOutput
from kvpage.params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)
THROUGHPUT = """\
Requests and tokens a second with all prompts submitted at once. Prompts are random token ids; every answer has
exactly --output-len tokens."""
LATENCY = """\
Seconds that one batch takes from submission to its last token; the prefix cache is off."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    benches: dict[str, Callable[[Sequence[str]], int]] = {
        "throughput": throughput,
        "latency": latency,
        "serve": bench_serve.run,
    }
    if not arguments or arguments[0] not in benches:
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                f"usage: kvpage bench {{{','.join(benches)}}} [MODEL] [FLAGS]\n\n"
                f"throughput  {THROUGHPUT}\n\nlatency     {LATENCY}\n\n"
                f"serve       {bench_serve.DESCRIPTION}"
            )
            return OK
        raise UsageError(
            "kvpage bench: say what to measure, throughput, latency or serve"
            + (f", not {arguments[0]!r}" if arguments else "")
        )
    return benches[arguments[0]](arguments[1:])


def throughput(arguments: Sequence[str]) -> int:
    """``kvpage bench throughput``."""
    parser = _parser("kvpage bench throughput", THROUGHPUT, input_len=128, output_len=64)
    parser.add_argument("--num-prompts", type=human_integer, default=100, metavar="N", help="[100]")
    parser.add_argument(
        "--num-warmups", type=human_integer, default=0, metavar="N", help="prompts run before [0]"
    )
    parser.add_argument("--prefix-len", type=human_integer, default=0, metavar="N",
                        help="tokens that all prompts begin with, beside --input-len [0]")  # fmt: skip
    parser.add_argument("--dataset-name", choices=("random",), default="random", help="[random]")
    parser.add_argument("--async-engine", action="store_true", help="through AsyncEngine")
    namespace = parser.parse_arguments(arguments)
    check_at_least(1, namespace, "num_prompts", "input_len", "output_len", "n")
    check_at_least(0, namespace, "num_warmups", "prefix_len")
    check_output(namespace.output_json)
    params, prompts = _workload(
        namespace, namespace.num_prompts + namespace.num_warmups, namespace.prefix_len
    )
    warmups, prompts = prompts[: namespace.num_warmups], prompts[namespace.num_warmups :]
    measure = _measure_async if namespace.async_engine else _measure
    outputs, seconds = measure(namespace, warmups, prompts, params)
    new = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    total = new + sum(len(output.prompt_token_ids) for output in outputs)
    result = {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": total,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": new / seconds,
    }
    return _report(namespace, result, f"Throughput: {len(outputs) / seconds:.2f} requests/s, "
                   f"{total / seconds:.2f} total tokens/s, {new / seconds:.2f} output tokens/s")  # fmt: skip


def latency(arguments: Sequence[str]) -> int:
    """``kvpage bench latency``."""
    parser = _parser("kvpage bench latency", LATENCY, input_len=32, output_len=128)
    parser.add_argument(
        "--batch-size", type=human_integer, default=8, metavar="N", help="requests at once [8]"
    )
    parser.add_argument(
        "--num-iters-warmup", type=human_integer, default=10, metavar="N", help="batches before [10]"
    )
    parser.add_argument(
        "--num-iters", type=human_integer, default=30, metavar="N", help="batches measured [30]"
    )
    namespace = parser.parse_arguments(arguments)
    check_at_least(1, namespace, "batch_size", "num_iters", "input_len", "output_len", "n")
    check_at_least(0, namespace, "num_iters_warmup")
    check_output(namespace.output_json)
    params, prompts = _workload(namespace, namespace.batch_size, 0)
    times: list[float] = []
    with open_engine(namespace, enable_prefix_caching=False, **_token_ids_only(namespace)) as engine:
        for _ in range(namespace.num_iters_warmup):
            engine.generate(prompts, params, progress=False)
        for _ in range(namespace.num_iters):
            watch = Stopwatch()
            engine.generate(prompts, params, progress=False)
            times.append(watch.seconds)
    percentiles = {str(percent): percentile(times, percent) for percent in PERCENTILES}
    result = {"avg_latency": statistics.fmean(times), "latencies": times, "percentiles": percentiles}
    lines = [f"Avg latency: {statistics.fmean(times):.4f} seconds"]
    lines += [
        f"{percent}% percentile latency: {seconds:.4f} seconds" for percent, seconds in percentiles.items()
    ]
    return _report(namespace, result, "\n".join(lines))


def _parser(prog: str, description: str, *, input_len: int, output_len: int) -> CommandParser:
    parser = CommandParser(prog, description, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--input-len", type=human_integer, default=input_len, metavar="N",
                        help=f"tokens of each prompt [{input_len}]")  # fmt: skip
    parser.add_argument("--output-len", type=human_integer, default=output_len, metavar="N",
                        help=f"tokens of each answer [{output_len}]")  # fmt: skip
    parser.add_argument("--n", type=human_integer, default=1, metavar="N", help="choices a prompt [1]")
    parser.add_argument("--disable-detokenize", action="store_true", help="leave the tokens as ids")
    parser.add_argument("--output-json", metavar="FILE", help="write the result there too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_engine_flags(parser)
    return parser


def _token_ids_only(namespace: argparse.Namespace) -> dict[str, bool]:
    """Prompts are token ids: without text to make, or a tokenizer to make it, none is needed."""
    return {"skip_tokenizer_init": namespace.disable_detokenize or not has_tokenizer(namespace)}


def _workload(
    namespace: argparse.Namespace, count: int, prefix: int
) -> tuple[SamplingParams, list[list[int]]]:
    seed = getattr(namespace, "seed", 0)
    prompts = random_prompts(
        vocabulary_size(namespace), [namespace.input_len] * count, prefix=prefix, seed=seed
    )
    params = SamplingParams(
        n=namespace.n, max_tokens=namespace.output_len, ignore_eos=True, temperature=1.0, top_p=1.0,
        detokenize=not namespace.disable_detokenize,
    )  # fmt: skip
    return params, prompts


def _measure(
    namespace: argparse.Namespace, warmups: list[list[int]], prompts: list[list[int]], params: SamplingParams
) -> tuple[list[RequestOutput], float]:
    with open_engine(namespace, **_token_ids_only(namespace)) as engine:
        if warmups:
            engine.generate(warmups, params, progress=False)
        watch = Stopwatch()
        return engine.generate(prompts, params), watch.seconds


def _measure_async(
    namespace: argparse.Namespace, warmups: list[list[int]], prompts: list[list[int]], params: SamplingParams
) -> tuple[list[RequestOutput], float]:
    with undivided():
        from kvpage.engine.aio import AsyncEngine  # torch, a second

    options = {**_token_ids_only(namespace), **engine_options(namespace)}

    async def measure() -> tuple[list[RequestOutput], float]:
        with undivided():
            made = AsyncEngine(chosen_model(namespace), **options)
        async with made as engine:
            for warmup in [engine.generate(prompt, params) for prompt in warmups]:
                await warmup
            watch = Stopwatch()
            handles = [engine.generate(prompt, params) for prompt in prompts]
            return [await handle for handle in handles], watch.seconds

    return asyncio.run(measure())


def _report(namespace: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    result = {**result, "model": chosen_model(namespace), "environment": environment()}
    if namespace.output_json:
        write_file(namespace.output_json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if namespace.json else text)
    if namespace.output_json:
        print(f"result: {namespace.output_json}", file=sys.stderr)
    return OK
