"""``kvpage inspect``: run a small load and draw what the KV blocks hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from kvpage.cli.main import OK
from kvpage.cli.session import check_output, counted, open_engine, write_file
from kvpage.cli.signals import interruptible
from kvpage.cli.workload import random_prompts, vocabulary_size
from kvpage.flags.engine import add_engine_flags, add_model_argument
from kvpage.flags.parser import CommandParser, check_at_least, human_integer
from kvpage.params import SamplingParams

DESCRIPTION = """\
Run a small load (prompts of different lengths with a common beginning, and one with several choices), stop it at a
step, and print the block map: which sequence holds which KV block, what is shared, what is kept for prefix hits.
Try --num-kv-blocks 24 to see sequences preempted."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = CommandParser("kvpage inspect", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument(
        "--requests", type=human_integer, default=6, metavar="N", help="requests of the load [6]"
    )
    parser.add_argument(
        "--n", type=human_integer, default=3, metavar="N", help="choices of the first request [3]"
    )
    parser.add_argument(
        "--prefix-len", type=human_integer, default=40, metavar="N", help="tokens all prompts begin with [40]"
    )
    parser.add_argument(
        "--output-len", type=human_integer, default=48, metavar="N", help="tokens each choice makes [48]"
    )
    parser.add_argument(
        "--step", type=human_integer, default=20, metavar="N", help="engine steps before the picture [20]"
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the picture as SVG")
    parser.add_argument("--width", type=human_integer, default=64, metavar="N", help="blocks a line [64]")
    parser.add_argument("--json", action="store_true", help="the block map as JSON instead of text")
    add_engine_flags(parser)
    namespace = parser.parse_arguments(arguments)
    check_at_least(1, namespace, "requests", "n", "output_len", "width")
    check_at_least(0, namespace, "step", "prefix_len")
    check_output(namespace.svg)
    vocabulary = vocabulary_size(namespace)
    lengths = [7 + 11 * index for index in range(namespace.requests)]
    prompts = random_prompts(vocabulary, lengths, prefix=namespace.prefix_len, seed=0)
    with open_engine(namespace, skip_tokenizer_init=True) as engine, interruptible() as stopped:
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
            if stopped():
                raise KeyboardInterrupt
        block_map, stats = engine.inspect(), engine.stats()
    if namespace.svg:
        write_file(namespace.svg, block_map.to_svg(namespace.width))
    if namespace.json:
        print(json.dumps({"step": steps, "stats": asdict(stats), **asdict(block_map)}))
        return OK
    print(
        f"after {counted(steps, 'step')}: sequences running {stats.running}, waiting {stats.waiting}; "
        f"{counted(stats.forks, 'fork')}, {counted(stats.copies, 'block')} copied on write, "
        f"{counted(stats.preemptions, 'preemption')}, "
        f"{stats.prefix_hits} of {counted(stats.prefix_queries, 'prompt token')} from the prefix cache"
    )
    print(block_map.to_text(namespace.width))
    if namespace.svg:
        print(f"picture: {namespace.svg}")
    return OK
