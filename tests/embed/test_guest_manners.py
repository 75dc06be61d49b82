"""kvpage is a guest in its host's process: it leaves it as it was, and never keeps it from ending."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from kvpage import Engine, SamplingParams

RunProgram = Callable[..., str]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)

PORTRAIT = '''
import asyncio, atexit, locale, logging, os, random, signal, sys, threading, time, warnings
import numpy, torch

def portrait():
    """Everything of this process that a guest could change."""
    loggers = [logging.getLogger(name) for name in (None, "kvpage", "kvpage.stats", "torch", "asyncio")]
    return {
        "environment": dict(os.environ),
        "logging": [(l.name, l.level, l.propagate, l.disabled, list(map(repr, l.handlers)), list(map(repr, l.filters)))
                    for l in loggers] + [logging.root.manager.disable, logging.raiseExceptions],
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "wakeup": repr(signal.set_wakeup_fd(-1)),
        "threads": sorted(t.name for t in threading.enumerate()),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "torch state": torch.random.get_rng_state().tolist(),
        "numpy state": repr(numpy.random.get_state()),
        "python state": random.getstate(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "precision": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "streams": (id(sys.stdout), id(sys.stderr), id(sys.stdin)),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.gettrace(), sys.getprofile()),
        "asyncgen hooks": tuple(sys.get_asyncgen_hooks()),
        "policy": id(asyncio.get_event_loop_policy()),
        "at exit": atexit._ncallbacks(),
        "warnings": list(map(repr, warnings.filters)),
        "recursion": sys.getrecursionlimit(),
        "switching": sys.getswitchinterval(),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }

def assert_as_before(before):
    after = portrait()
    for name, value in before.items():
        assert after[name] == value, (name, value, after[name])
'''

ENGINES = """
from kvpage import Engine, AsyncEngine, SamplingParams
params = SamplingParams(max_tokens=12, n=2, seed=1, logprobs=1, stop="zzz")

def use_engine():
    with Engine(r"{model}") as engine:
        engine.generate(["The block", "x"], params)
        list(engine.stream("x", params))
        engine.chat([{"role": "user", "content": "x"}], params)
        engine.inspect().to_svg()

async def use_async():
    async with AsyncEngine(r"{model}") as engine:
        await asyncio.gather(*(engine.generate("x", params) for _ in range(4)))
        async for _ in engine.generate("x", params):
            break
"""


def test_a_process_is_as_before_after_create_use_and_close(run_program: RunProgram) -> None:
    body = """
import logging.config
logging.getLogger().setLevel(logging.ERROR)
random.seed(5), numpy.random.seed(6), torch.manual_seed(7)
use_engine()  # what libraries set up when they are first used is theirs
before = portrait()
use_engine()
assert_as_before(before)
asyncio.run(use_async())
assert_as_before(before)
print("same")
"""
    assert run_program(PORTRAIT + ENGINES + body) == "same\n"


def test_even_the_first_engine_changes_nothing(run_program: RunProgram) -> None:
    body = """
torch.zeros(200, 200) @ torch.zeros(200, 200)  # OpenMP's threads are torch's
before = portrait()
use_engine()
asyncio.run(use_async())
after = portrait()
for name, value in before.items():
    assert after[name] == value, (name, value, after[name])
print("same")
"""
    assert run_program(PORTRAIT + ENGINES + body) == "same\n"


def test_a_running_engine_has_one_thread_if_it_is_async_and_none_if_not(run_program: RunProgram) -> None:
    body = '''
def tasks(expected):
    """Threads that the system knows; one that was joined may take a moment to go."""
    for _ in range(1 if expected < 0 else 1000):
        if len(os.listdir("/proc/self/task")) == expected:
            break
        time.sleep(0.005)
    return len(os.listdir("/proc/self/task"))
use_engine()
before, names = tasks(-1), [t.name for t in threading.enumerate()]
engine = Engine(r"{model}")
engine.generate("x", params)
assert [t.name for t in threading.enumerate()] == names
assert tasks(before) == before
other = AsyncEngine(r"{model}")
asyncio.run(other.generate("x", params).result())
assert [t.name for t in threading.enumerate()] == [*names, "kvpage-engine"], threading.enumerate()
assert tasks(before + 1) == before + 1
other.close()
assert tasks(before) == before
print("alone")
'''
    assert run_program(PORTRAIT + ENGINES + body) == "alone\n"


def test_nothing_heavy_comes_along(run_program: RunProgram) -> None:
    body = """
use_engine()
asyncio.run(use_async())
print([name for name in ("transformers", "rich", "huggingface_hub", "fastapi", "triton")
       if name in sys.modules])
"""
    assert run_program(PORTRAIT + ENGINES + body) == "[]\n"


def test_the_hosts_defaults_do_not_reach_the_engine(run_program: RunProgram) -> None:
    body = """
def tokens():
    with Engine(r"{model}") as engine:
        return [c.token_ids for c in engine.generate("The block", params)[0].outputs]
expected = tokens()
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
before = portrait()
assert tokens() == expected
assert_as_before(before)
with torch.inference_mode():
    assert tokens() == expected
    engine = Engine(r"{model}")
assert [c.token_ids for c in engine.generate("The block", params)[0].outputs] == expected
print("same")
"""
    assert run_program(PORTRAIT + ENGINES + body) == "same\n"


def test_a_hosts_model_is_not_touched(run_program: RunProgram) -> None:
    body = """
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(r"{model}").train()
names = {name: (p.data_ptr(), p.requires_grad, p.dtype, p.sum().item()) for name, p in model.named_parameters()}
with Engine(model, tokenizer=r"{model}") as engine:
    engine.generate("x", params)
assert names == {name: (p.data_ptr(), p.requires_grad, p.dtype, p.sum().item()) for name, p in model.named_parameters()}
assert model.training
model(torch.tensor([[5, 6]])).logits.sum().backward()
print("same")
"""
    assert run_program(PORTRAIT + ENGINES + body) == "same\n"


ENDINGS = {
    "idle engine": 'engine = Engine(model); engine.generate("x", params)',
    "engine in mid-generation": 'engine = Engine(model); engine.submit("x", params); engine.step()',
    "open stream": 'engine = Engine(model); stream = engine.stream("x", params); next(stream)',
    "idle async engine": "engine = AsyncEngine(model)",
    "async engine in mid-generation": 'engine = AsyncEngine(model); handle = engine.generate("x", endless)',
    "event loop that was left": "engine = AsyncEngine(model); asyncio.run(leave(engine))",
    "three at once": 'engines = [AsyncEngine(model) for _ in range(3)]; [e.generate("x", endless) for e in engines]',
    "sys.exit": 'engine = AsyncEngine(model); engine.generate("x", endless); sys.exit(0)',
    "made in a thread": "threading.Thread(target=lambda: made.append(AsyncEngine(model))).start()",
    "dropped": 'AsyncEngine(model).generate("x", endless)',
    "dropped in a cycle": 'e = AsyncEngine(model); e.cycle = e; e.generate("x", endless); del e',
    "with a thread that waits": "engine = AsyncEngine(model); threading.Thread(target=asyncio.run, "
    'args=(engine.generate("x", params).result(),)).start()',
}


def test_programs_that_never_close_their_engine_end_with_status_0(run_program: RunProgram) -> None:
    # Each program is a fork of one that has imported torch, and ends as any program does: at the end of its file.
    source = """
import asyncio, os, sys, threading, time
from kvpage import AsyncEngine, Engine, SamplingParams
import kvpage.engine.build
model, made = r"{model}", []
params, endless = SamplingParams(max_tokens=12), SamplingParams(max_tokens=400, ignore_eos=True)

async def leave(engine):
    handle = engine.generate("x", endless)
    async for event in handle:
        asyncio.ensure_future(handle.result())
        return

def end_of(child):
    for _ in range(1000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    return "never"

program, ends = None, {}
for name, program in ENDINGS.items():
    child = os.fork()
    if child == 0:
        break
    ends[name] = end_of(child)
    program = None
if program is None:
    assert ends == dict.fromkeys(ENDINGS, 0), ends
    print("all ended")
else:
    exec(program)
"""
    assert run_program(f"ENDINGS = {ENDINGS!r}\n" + source) == "all ended\n"


def test_a_forked_child_is_told_and_ends(run_program: RunProgram) -> None:
    source = """
import os, sys, warnings
warnings.simplefilter("ignore")
from kvpage import AsyncEngine, EngineDeadError, SamplingParams
engine = AsyncEngine(r"{model}")
engine.generate("x", SamplingParams(max_tokens=400, ignore_eos=True))
child = os.fork()
if child == 0:
    try:
        engine.generate("x")
    except EngineDeadError as error:
        sys.exit(0 if "fork" in str(error) else 1)
    sys.exit(2)
_, status = os.waitpid(child, 0)
assert status == 0, status
engine.check_health()
print("parent")
"""
    assert run_program(source, timeout=30) == "parent\n"


def test_a_notebook_cell_can_be_interrupted(run_program: RunProgram) -> None:
    source = '''
import os, signal
from kvpage import Engine, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with it ignored
engine = Engine(r"{model}")
short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
expected = engine.generate("The block", short)[0].outputs[0].token_ids
executor = engine._core._executor
submit, left = executor.submit, 0

def interrupted(plan):
    """Ctrl-C arrives while the model runs, where nearly all of the time goes."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return submit(plan)

executor.submit = interrupted
for left in (1, 2, 5):
    try:
        engine.generate(["x"] * 30, SamplingParams(max_tokens=400, ignore_eos=True))
    except KeyboardInterrupt:
        print("interrupted")
    assert engine.stats().running == engine.stats().waiting == engine.stats().used_blocks == 0
    assert engine.generate("The block", short)[0].outputs[0].token_ids == expected
'''
    assert run_program(source) == "interrupted\n" * 3


def test_two_engines_interleaved_step_by_step_give_what_each_gives_alone(tiny: Path, tmp_path: Path) -> None:
    from tiny_checkpoint import write_checkpoint

    folders = [tiny, write_checkpoint(tmp_path / "other", seed=4, num_hidden_layers=3, num_key_value_heads=4)]
    options = [{"block_size": 4, "num_kv_blocks": 20}, {"block_size": 16, "max_num_batched_tokens": 8}]
    prompts = [list(range(20, 40)), list(range(30, 75)), [9]]
    params = SamplingParams(temperature=1.0, n=2, seed=3, max_tokens=24, ignore_eos=True)

    def alone(index: int) -> list[list[int]]:
        with Engine(folders[index], **options[index]) as engine:
            return [c.token_ids for o in engine.generate(prompts, params) for c in o.outputs]

    expected = [alone(0), alone(1)]
    engines = [Engine(folder, **option) for folder, option in zip(folders, options, strict=True)]
    handles = [[engine.submit(prompt, params) for prompt in prompts] for engine in engines]
    while any([engine.step() for engine in engines]):
        pass
    found = [[c.token_ids for handle in some for c in handle.result().outputs] for some in handles]
    assert found == expected
    assert found[0] != found[1]
    for engine in engines:
        engine.close()


def test_one_engine_closing_leaves_the_other_alone(tiny: Path) -> None:
    engines = [Engine(tiny) for _ in range(3)]
    expected = engines[0].generate("The block", GREEDY)[0].outputs[0].token_ids
    for engine, survivor in itertools.pairwise(engines):
        engine.close()
        assert survivor.generate("The block", GREEDY)[0].outputs[0].token_ids == expected
    engines[-1].close()
