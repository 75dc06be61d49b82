"""Q13, Q16: when weights are read, what a restart keeps, and how long a CPU takes to the first token.

    python benchmarks/claims/cold_start.py [--repeats 3] [--json]

Times are medians over fresh processes, from the start of the interpreter, on the bundled model; they depend on the
machine. That the weights are in memory before the first request is shown by overwriting their file.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from report import arguments, show

from kvpage import Engine, SamplingParams

QUESTION = (
    "A block table is what a paged cache keeps for each sequence, so that its tokens need not be neighbours"
)
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
CHILD = f"""
import json, sys, time
import kvpage
marks = [time.time()]
engine = kvpage.Engine("demo")
marks.append(time.time())
for _ in range(2):
    next(engine.stream({QUESTION!r}, kvpage.SamplingParams(temperature=0, max_tokens=2)))
    marks.append(time.time())
    engine.reset_prefix_cache()
engine.close()
print(json.dumps(marks))
"""
MARKS = ("kvpage imported", "engine ready", "first token", "first token of the next request")


def seconds_of_a_start() -> list[float]:
    """Seconds from the start of a fresh interpreter to each of ``MARKS``; the last from the one before."""
    start = time.time()
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    imported, ready, first, second = json.loads(run.stdout)
    return [imported - start, ready - start, first - start, second - first]


def tokens(engine: Engine) -> list[int]:
    """The answer to ``QUESTION``."""
    return engine.generate(QUESTION, GREEDY)[0].outputs[0].token_ids


def answers_without_its_file() -> bool:
    """Whether an engine whose weights file is all zeros from before the first request on answers as ever."""
    source = importlib.resources.files("kvpage.demo") / "checkpoint"
    with tempfile.TemporaryDirectory() as folder, importlib.resources.as_file(source) as checkpoint:
        copy = Path(shutil.copytree(checkpoint, Path(folder) / "checkpoint"))
        with Engine(str(copy)) as engine, Engine("demo") as untouched:
            weights = copy / "model.safetensors"
            with weights.open("r+b") as file:
                file.write(bytes(weights.stat().st_size))
            return tokens(engine) == tokens(untouched)


def cached_tokens() -> list[dict[str, Any]]:
    """Prompt tokens that the prefix cache served: asked again, and after a restart with the same key."""
    table = []
    for title in ("first engine", "a new engine, same prefix_cache_key"):
        with Engine("demo", prefix_cache_key=b"the same key") as engine:
            first, again = (engine.generate(QUESTION, GREEDY)[0] for _ in range(2))
        line = {"engine": title, "prompt": len(first.prompt_token_ids)}
        table.append(
            {**line, "cached, first time": first.num_cached_tokens, "cached, again": again.num_cached_tokens}
        )
    return table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs = [seconds_of_a_start() for _ in range(options.repeats)]
    times = {
        name: round(median(values), 3) for name, values in zip(MARKS, zip(*runs, strict=True), strict=True)
    }
    in_memory, kept = answers_without_its_file(), cached_tokens()
    is_cold = kept[1]["cached, first time"] == 0 and kept[0]["cached, again"] > 0
    show(
        {
            "Seconds": [{"until": name, "s": value} for name, value in times.items()],
            "Prefix cache": kept,
            "Weights": [
                {"file overwritten before the first request": "same answer" if in_memory else "another"}
            ],
        },
        {
            "Q13": f"{'refuted' if in_memory and is_cold else 'bounded'}: the weights are in memory before the first "
            f"request, and a new engine begins with {kept[1]['cached, first time']} cached tokens",
            "Q16": f"refuted: {times['engine ready']:.1f} s from nothing to an engine on a CPU, "
            f"{times['first token']:.1f} s to its first token",
        },
        options.json,
    )


if __name__ == "__main__":
    main()
