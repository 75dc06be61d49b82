"""Programs written for vLLM run with the import and the model path changed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpage import LLM, AsyncEngineArgs, AsyncLLMEngine, ConfigError, EngineArgs, SamplingParams
from kvpage.utils import random_uuid

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

P1 = """
from kvpage import LLM, SamplingParams

llm = LLM(model=r"{model}")
params = SamplingParams(temperature=0.7, max_tokens=12)
outputs = llm.generate(["Explain PagedAttention"], params)
print(repr(outputs[0].outputs[0].text))
"""

P2 = """
from kvpage import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=50)
llm = LLM(model=r"{model}")
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

P6 = """
import asyncio

from kvpage import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from kvpage.utils import random_uuid


async def main():
    engine_args = AsyncEngineArgs(
        model=r"{model}", max_model_len=512, gpu_memory_utilization=0.9, disable_log_stats=False
    )
    llm = AsyncLLMEngine.from_engine_args(engine_args)
    sampling_params = SamplingParams(temperature=0.7, max_tokens=12)
    prompts = [f"Question {index}" for index in range(5)]
    tasks = [llm.generate(prompt, sampling_params, request_id=random_uuid()) for prompt in prompts]
    results = await asyncio.gather(*tasks)
    for result in results:
        print(repr(result.outputs[0].text))


asyncio.run(main())
"""


def test_snippet_p1_runs(run_program: Callable[..., str]) -> None:
    assert len(run_program(P1).splitlines()) == 1


def test_snippet_p2_prints_its_prompts_in_order(run_program: Callable[..., str]) -> None:
    lines = run_program(P2).splitlines()
    assert [line.split("'")[1] for line in lines] == [
        "Hello, my name is", "The capital of France is", "The future of AI is",
    ]  # fmt: skip


def test_snippet_p6_runs_and_ends_without_closing_its_engine(run_program: Callable[..., str]) -> None:
    assert len(run_program(P6).splitlines()) == 5


def test_llm_takes_vllms_arguments(tiny: Path) -> None:
    with LLM(model=str(tiny)) as llm:
        (output,) = llm.generate("x", sampling_params=GREEDY, use_tqdm=False)
        (same,) = llm.generate(prompts=["x"], sampling_params=[GREEDY])
        assert output.outputs[0].text == same.outputs[0].text
        (answer,) = llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False)
        assert answer.prompt == "<s><|user|>x<|assistant|>"


def test_async_llm_engine_yields_cumulative_outputs(make_async: Callable[..., Any]) -> None:
    engine = make_async(kind=AsyncLLMEngine)

    async def main() -> tuple[list[Any], Any]:
        seen = [output async for output in engine.generate("The", GREEDY, request_id="r")]
        return seen, await engine.generate("The", GREEDY, request_id="r")

    seen, whole = asyncio.run(main())
    texts = [output.outputs[0].text for output in seen]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == whole.outputs[0].text
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    assert {output.request_id for output in seen} == {"r"}
    counts = [len(output.outputs[0].token_ids) for output in seen]
    assert counts == sorted(counts), "an earlier output does not grow later"
    assert counts[0] < 12


def test_async_llm_engine_aborts_and_shuts_down(make_async: Callable[..., Any]) -> None:
    engine = make_async(kind=AsyncLLMEngine)

    async def main() -> Any:
        handle = engine.generate("The", GREEDY.clone(max_tokens=500), request_id="r")
        await engine.abort("r")
        return await handle

    assert asyncio.run(main()).outputs[0].finish_reason == "abort"
    engine.shutdown()
    assert not engine._worker.alive


def test_engine_args_are_checked_when_made() -> None:
    for kind in (EngineArgs, AsyncEngineArgs):
        with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
            kind(model="demo", max_modellen=5)


def test_random_uuids_differ() -> None:
    found = {random_uuid() for _ in range(100)}
    assert len(found) == 100
    assert all(len(value) == 32 for value in found)
