"""``kvpage inspect``: run a small load and draw what the KV blocks hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from kvpage.cli.engine_flags import add_engine_flags, add_model_argument
from kvpage.cli.main import OK
from kvpage.cli.parser import CommandParser
from kvpage.cli.session import open_engine, write_file
from kvpage.cli.workload import random_prompts, vocabulary_size
from kvpage.errors import ConfigError
from kvpage.params import SamplingParams

DESCRIPTION = """\
Run a small load (prompts of different lengths with a common beginning, and one with several choices), stop it at a
step, and print the block map: which sequence holds which KV block, what is shared, what is kept for prefix hits.
Try --num-kv-blocks 24 to see sequences preempted."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = CommandParser("kvpage inspect", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--requests", type=int, default=6, metavar="N", help="requests of the load [6]")
    parser.add_argument("--n", type=int, default=3, metavar="N", help="choices of the first request [3]")
    parser.add_argument(
        "--prefix-len", type=int, default=40, metavar="N", help="tokens all prompts begin with [40]"
    )
    parser.add_argument(
        "--output-len", type=int, default=48, metavar="N", help="tokens each choice makes [48]"
    )
    parser.add_argument(
        "--step", type=int, default=20, metavar="N", help="engine steps before the picture [20]"
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the picture as SVG")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="blocks a line [64]")
    parser.add_argument("--json", action="store_true", help="the block map as JSON instead of text")
    add_engine_flags(parser)
    namespace = parser.parse_arguments(arguments)
    for name in ("requests", "n", "output_len", "width"):
        if getattr(namespace, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(namespace, name)}"
            )
    vocabulary = vocabulary_size(namespace)
    lengths = [7 + 11 * index for index in range(namespace.requests)]
    prompts = random_prompts(vocabulary, lengths, prefix=namespace.prefix_len, seed=0)
    with open_engine(namespace) as engine:
        for index, prompt in enumerate(prompts):
            params = SamplingParams(
                n=namespace.n if index == 0 else 1,
                max_tokens=namespace.output_len,
                ignore_eos=True,
                seed=index,
            )
            engine.submit(prompt, params, request_id=f"request-{index}")
        steps = 0
        while steps < namespace.step and engine.step():
            steps += 1
        block_map, stats = engine.inspect(), engine.stats()
    if namespace.svg:
        write_file(namespace.svg, block_map.to_svg(namespace.width))
    if namespace.json:
        print(json.dumps({"step": steps, "stats": asdict(stats), **asdict(block_map)}))
        return OK
    print(
        f"after {steps} steps: {stats.running} sequences run, {stats.waiting} wait; {stats.forks} forks, "
        f"{stats.copies} blocks copied on write, {stats.preemptions} preemptions, "
        f"{stats.prefix_hits} of {stats.prefix_queries} prompt tokens from the prefix cache"
    )
    print(block_map.to_text(namespace.width))
    if namespace.svg:
        print(f"picture: {namespace.svg}")
    return OK
