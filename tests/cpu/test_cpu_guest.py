"""The native backend as a guest of its process: threads, forks, ends of programs, engines side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpage import Engine, SamplingParams
from kvpage.plugins import PluginRegistry
from kvpage_cpu import plugin
from tiny_checkpoint import write_checkpoint

RunProgram = Callable[[str], str]
TESTS = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

PREAMBLE = """
import gc, os, signal, sys, time
import torch
torch.set_num_threads(2)
from kvpage import Engine, PluginError, SamplingParams
from kvpage.plugins import PluginRegistry
from kvpage_cpu import plugin
params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

def engine():
    made = Engine({model!r}, num_kv_blocks=16, plugins=PluginRegistry(plugins=[plugin], entry_points=False))
    assert made.config.decoder_backend == "cpu", made.config.reasons
    return made

def threads():
    return len(os.listdir("/proc/self/task"))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run_program(tiny: Path) -> RunProgram:
    """run_program(source) -> its output; it must end by itself with status 0. ``engine()`` makes one over 2 threads."""

    def run(source: str) -> str:
        path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        program = PREAMBLE.replace("{model!r}", repr(str(tiny))) + source
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_closed_engines_give_their_threads_back(run_program: RunProgram) -> None:
    """Torch's and the C library's own threads are there before: an engine of the reference backend starts them."""
    out = run_program("""
with engine() as first:
    first.generate("x", params, progress=False)
gc.collect()
before = threads()
made = [engine() for _ in range(3)]
for one in made:
    one.generate("x", params, progress=False)
during = threads()
for one in made:
    one.close()
del one, made
gc.collect()
print(during > before, threads() <= before)
""")
    assert out == "True True\n"


def test_a_forked_child_is_refused_and_does_not_hang(run_program: RunProgram) -> None:
    """The parent goes on with its engine afterwards."""
    out = run_program("""
made = engine()
expected = made.generate([5, 6], params, progress=False)[0].outputs[0].token_ids
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        made.generate([5, 6], params, progress=False)
    except Exception as error:
        told = f"{error} {error.__cause__}"
        os._exit(7 if "forked after the engine was made" in told else 8)
    os._exit(9)
_, status = os.waitpid(child, 0)
again = made.generate([5, 6], params, progress=False)[0].outputs[0].token_ids
print(os.waitstatus_to_exitcode(status), again == expected)
""")
    assert out == "7 True\n"


@pytest.mark.parametrize("work", ["", "made.generate('x', params, progress=False)"])
def test_a_program_that_never_closes_its_engine_ends_by_itself(run_program: RunProgram, work: str) -> None:
    assert run_program(f"made = engine()\n{work}\nprint('end')") == "end\n"


def test_engines_that_step_at_once_in_two_threads_give_right_tokens(tiny: Path) -> None:
    prompts = [[[5 + i, 7 + i, 11]] for i in range(2)]
    registry = PluginRegistry(plugins=[plugin], entry_points=False)
    with Engine(tiny, num_kv_blocks=16, plugins=registry) as alone:
        expected = [
            alone.generate(prompt, GREEDY, progress=False)[0].outputs[0].token_ids for prompt in prompts
        ]
    assert expected[0] != expected[1]
    found: list[list[list[int]]] = [[], []]
    together = threading.Barrier(2, timeout=30)

    def steps(index: int) -> None:
        with Engine(tiny, num_kv_blocks=16, plugins=registry) as engine:
            assert engine.config.decoder_backend == "cpu"
            together.wait()
            for _ in range(8):
                output = engine.generate(prompts[index], GREEDY, progress=False)[0].outputs[0]
                found[index].append(list(output.token_ids))

    threads = [threading.Thread(target=steps, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[list(tokens)] * 8 for tokens in expected]
