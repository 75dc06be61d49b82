"""What an engine took goes back to the system when it is closed, or when its making fails."""

from __future__ import annotations

from collections.abc import Callable

PROGRAM = '''
import asyncio, gc, sys
from pathlib import Path
from tiny_checkpoint import write_checkpoint
from kvpage import AsyncEngine, CheckpointError, Engine, EngineDeadError, SamplingParams

MIB = 2**20
# Much memory and little work: 51 MB of embeddings, 32 KiB of KV a token.
folder = write_checkpoint(Path(sys.argv[1]), vocab_size=100_000, hidden_size=64, num_attention_heads=8,
                          num_key_value_heads=8, head_dim=128, num_hidden_layers=4)
params = SamplingParams(max_tokens=2, ignore_eos=True)
options = {"kv_cache_memory": 96 * MIB, "max_num_batched_tokens": 512, "max_model_len": 512}

def sizes():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmRSS")}

def fill(engine):
    """Every block of the pool is written, and stays in the prefix cache."""
    while engine.stats().cached_blocks < 0.9 * engine.stats().total_blocks:
        fill.tail += 1
        yield [[5 + fill.tail, 5 + i] * 120 for i in range(4)]
fill.tail = 0

def synchronous():
    with Engine(folder, **options) as engine:
        for prompts in fill(engine):
            engine.generate(prompts, params)
        return sizes()

def unclosed():
    engine = Engine(folder, **options)
    for prompts in fill(engine):
        engine.generate(prompts, params)
    return sizes()

def asynchronous():
    async def main():
        async with AsyncEngine(folder, **options) as engine:
            for prompts in fill(engine):
                await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
            return sizes()
    return asyncio.run(main())

def died():
    engine = Engine(folder, **options)
    for prompts in fill(engine):
        engine.generate(prompts, params)
    peak = sizes()
    def fails(model, hidden):  # its frame holds the model, and the error holds its frame
        raise ValueError("boom")
    type(engine._core._executor._runner._model).logits = fails
    try:
        engine.generate([5], params)
    except EngineDeadError as error:
        engine.close()
        died.errors = engine, error
    return peak
'''

SIX_ENGINES = """
# What torch and the C library set up at first use is theirs: glibc reserves 64 MiB of addresses for the first
# thread that allocates, and gives them to the next one.
synchronous()
asynchronous()
before = sizes()
for use in (synchronous, synchronous, asynchronous, unclosed, asynchronous, died):
    peak = use()
    gc.collect()
    for name in before:
        taken, kept = (peak[name] - before[name]) / MIB, (sizes()[name] - before[name]) / MIB
        assert taken > 90, (use.__name__, name, taken)
        # Only close() also empties the heap's store of free pages, of which glibc keeps up to 64 MiB.
        assert kept < (96 if use is unclosed else 32), (use.__name__, name, kept)
print("returned")
"""

FAILED_START = """
synchronous()
before = sizes()
for wrong in ({"attention_backend": "nope"}, {"tokenizer": str(folder / "nowhere")}, {"chat_template": "{% if %}"},
              {"kv_cache_memory": "900000TiB"}, {"scheduling_policy": "nope"}):
    for _ in range(3):
        try:
            Engine(folder, **{**options, **wrong})
        except Exception as error:
            pass
        else:
            raise AssertionError(wrong)
gc.collect()
after = sizes()
for name in before:
    assert (after[name] - before[name]) / MIB < 32, (name, before, after)
print("returned")
"""


def test_six_engines_whose_caches_were_filled_give_everything_back(
    run_program: Callable[..., str], tmp_path: object
) -> None:
    assert run_program(PROGRAM + SIX_ENGINES, f"{tmp_path}/big") == "returned\n"


def test_an_engine_that_could_not_start_keeps_nothing(
    run_program: Callable[..., str], tmp_path: object
) -> None:
    assert run_program(PROGRAM + FAILED_START, f"{tmp_path}/big") == "returned\n"
