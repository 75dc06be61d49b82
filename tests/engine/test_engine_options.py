"""What the options of an engine do, beside those that only size it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from engine_state import MakeEngine

from kvpage import ConfigError, Engine, QueueFullError, RequestError, SamplingParams
from tiny_checkpoint import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "blocks?"}]


@pytest.fixture
def with_defaults(tmp_path: Path) -> Path:
    """A checkpoint whose generation_config.json asks for near-greedy sampling."""
    folder = write_checkpoint(tmp_path / "defaults")
    values = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.9, "repetition_penalty": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_sampling_defaults_come_from_the_model(make_engine: MakeEngine, with_defaults: Path) -> None:
    engine = make_engine(with_defaults)
    unsaid = SamplingParams(max_tokens=12, ignore_eos=True)
    said = unsaid.clone(temperature=0.6, top_k=1, top_p=0.9, repetition_penalty=0.3)
    first, second = engine.generate(["The", "The"], [unsaid, said])
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    (other,) = engine.generate("The", said.clone(repetition_penalty=1.0))
    assert other.outputs[0].token_ids != first.outputs[0].token_ids, "the penalty is what the default set"


def test_sampling_defaults_can_be_left_alone(make_engine: MakeEngine, with_defaults: Path) -> None:
    engine = make_engine(with_defaults, generation_config="none")
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    first, second = engine.generate(
        ["The", "The"], [params, params.clone(temperature=1.0, top_p=1.0, top_k=0)]
    )
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_without_a_tokenizer_ids_go_in_and_out(make_engine: MakeEngine, engine: Engine) -> None:
    bare = make_engine(skip_tokenizer_init=True)
    assert bare.tokenizer is None
    (with_text,) = engine.generate("The block", GREEDY)
    (output,) = bare.generate(list(with_text.prompt_token_ids), GREEDY)
    assert output.outputs[0].token_ids == with_text.outputs[0].token_ids
    assert output.outputs[0].text == ""
    for use, param in (
        (lambda: bare.generate("The"), "prompt"),
        (lambda: bare.generate([5], GREEDY.clone(stop="x")), "stop"),
        (lambda: bare.generate([5], GREEDY.clone(bad_words=["x"])), "bad_words"),
        (lambda: bare.chat(MESSAGES), "messages"),
    ):
        with pytest.raises(RequestError) as caught:
            use()
        assert caught.value.param == param


def test_a_checkpoint_without_tokenizer_runs_on_ids(make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bare", tokenizer=False)
    (output,) = make_engine(folder, skip_tokenizer_init=True).generate([5, 6], GREEDY)
    assert len(output.outputs[0].token_ids) == 8


def test_another_tokenizer_can_be_named(make_engine: MakeEngine, tiny: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bare", tokenizer=False)
    (output,) = make_engine(folder, tokenizer=tiny).generate("The", GREEDY)
    assert output.outputs[0].text


def test_a_given_chat_template_replaces_the_models(make_engine: MakeEngine) -> None:
    engine = make_engine(chat_template="{{ messages[0]['content'] | upper }}")
    assert engine.render_chat(MESSAGES) == "BLOCKS?"


def test_a_chat_template_that_does_not_compile_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat_template.*does not compile"):
        Engine(tiny, chat_template="{% if %}")


def test_a_model_with_a_broken_template_still_completes(
    make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "broken")
    (folder / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    engine = make_engine(folder)
    assert "does not compile" in caplog.text
    assert engine.generate("The", GREEDY)
    with pytest.raises(RequestError, match="no chat template"):
        engine.chat(MESSAGES)


def test_tools_take_the_template_made_for_them(make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tools")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (folder / "chat_template.jinja").write_text("plain", encoding="utf-8")
    (templates / "tool_use.jinja").write_text("with {{ tools[0]['name'] }}", encoding="utf-8")
    engine = make_engine(folder)
    assert engine.render_chat(MESSAGES) == "plain"
    assert engine.render_chat(MESSAGES, tools=[{"name": "clock"}]) == "with clock"


def test_equal_prefixes_are_served_from_the_cache(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(20, 51))
    first, second = (engine.generate([*prompt, tail], GREEDY)[0] for tail in (60, 61))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 28)
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (64, 28)


def test_a_burst_with_a_common_prefix_computes_it_once(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(20, 52))
    outputs = engine.generate([[*prompt, tail] for tail in range(60, 66)], GREEDY)
    assert [output.num_cached_tokens for output in outputs] == [0] + [32] * 5


def test_the_prefix_cache_can_be_off(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4, enable_prefix_caching=False)
    outputs = [engine.generate(list(range(20, 52)), GREEDY)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert engine.stats().cached_blocks == 0


def test_a_salt_keeps_prefixes_apart(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(20, 52))

    def cached(salt: str | None, *, in_mapping: bool = False) -> int:
        given: Any = {"prompt_token_ids": prompt, "cache_salt": salt} if in_mapping else prompt
        return (
            engine.submit(given, GREEDY, cache_salt=None if in_mapping else salt).result().num_cached_tokens
        )

    assert [cached(None), cached("a"), cached("b"), cached("a"), cached("", in_mapping=True)] == [
        0,
        0,
        0,
        28,
        0,
    ]
    assert cached("b", in_mapping=True) == 28


def test_the_prefix_cache_is_forgotten_on_demand(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(20, 52))
    handle = engine.submit(prompt, GREEDY)
    engine.step()
    assert engine.reset_prefix_cache() is False
    handle.result()
    assert engine.reset_prefix_cache() is True
    assert engine.stats().cached_blocks == 0
    assert engine.generate(prompt, GREEDY)[0].num_cached_tokens == 0


def order_of_ends(engine: Engine, priorities: list[int]) -> list[int]:
    handles = [engine.submit([5, 6, index + 7], GREEDY, priority=p) for index, p in enumerate(priorities)]
    ended: list[int] = []
    while engine.step() or len(ended) < len(handles):
        ended += [index for index, handle in enumerate(handles) if handle.done and index not in ended]
    return ended


def test_priority_goes_before_arrival(make_engine: MakeEngine) -> None:
    engine = make_engine(scheduling_policy="priority", max_num_seqs=1)
    assert order_of_ends(engine, [5, 1, 3, 1]) == [1, 3, 2, 0]
    assert order_of_ends(make_engine(max_num_seqs=1), [5, 1, 3, 1]) == [0, 1, 2, 3]
    outputs = engine.generate([[5], [6]], GREEDY, priority=[2, 1])
    queued = [output.metrics.queued or 0.0 for output in outputs]
    assert queued[0] > queued[1]


def test_a_full_queue_refuses_and_recovers(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    handles = [engine.submit([5, 6], GREEDY) for _ in range(3)]
    with pytest.raises(QueueFullError, match="max_num_queued_reqs is 2"):
        engine.submit([5, 6], GREEDY)
    assert all(len(handle.result().outputs[0].token_ids) == 8 for handle in handles)
    assert engine.generate([5, 6], GREEDY)


def test_queued_prompt_tokens_are_limited(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_tokens=20)
    handles = [engine.submit([5] * 10, GREEDY) for _ in range(2)]
    with pytest.raises(QueueFullError, match="max_num_queued_tokens is 20"):
        engine.submit([5], GREEDY)
    for handle in handles:
        handle.result()


def test_a_list_that_overfills_the_queue_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    with pytest.raises(QueueFullError):
        engine.generate([[5, 6]] * 10, GREEDY)
    assert engine.stats().waiting == engine.stats().running == 0


def test_an_already_loaded_model_shares_its_weights(
    make_engine: MakeEngine, engine: Engine, tiny: Path, oracle: Any
) -> None:
    from_object = make_engine(oracle, tokenizer=tiny)
    prompts = ["The block", "Paged"]
    assert [o.outputs[0].token_ids for o in from_object.generate(prompts, GREEDY)] == [
        o.outputs[0].token_ids for o in engine.generate(prompts, GREEDY)
    ]


def test_dummy_weights_need_no_weight_file(make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "shape-only")
    (folder / "model.safetensors").unlink()
    (output,) = make_engine(folder, load_format="dummy").generate("The", GREEDY)
    assert len(output.outputs[0].token_ids) == 8


def test_every_value_states_its_reason(make_engine: MakeEngine) -> None:
    config = make_engine(max_num_seqs=3, kv_cache_memory="1MiB").config
    assert (config.max_num_seqs, config.max_model_len, config.dtype) == (3, 512, "float32")
    assert config.kv_bytes <= 2**20
    assert config.reasons["max_num_seqs"] == "given"
    assert config.reasons["kv_memory"] == "kv_cache_memory given"


def test_vllms_names_of_options_are_known(make_engine: MakeEngine) -> None:
    assert make_engine(num_gpu_blocks_override=10).stats().total_blocks == 10
    assert make_engine(kv_cache_memory_bytes=2**20).config.reasons["kv_memory"] == "kv_cache_memory given"


def test_gpu_memory_utilization_on_a_cpu_is_a_note(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kvpage"):
        make_engine(gpu_memory_utilization=0.9)
    assert "gpu_memory_utilization is not applicable on a CPU" in caplog.text


def test_log_stats_write_a_line_only_when_asked(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpage.engine.stats.LOG_INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, "kvpage.stats"):
        make_engine().generate("The", GREEDY)
        assert "throughput" not in caplog.text
        make_engine(disable_log_stats=False).generate("The", GREEDY)
    assert "Avg generation throughput" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "did you mean 'max_num_seqs'"),
        ({"enable_lora": True}, "LoRA has not landed yet"),
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding has not landed yet"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False"),
        ({"plugins": 5}, "plugins must be a PluginRegistry"),
        ({"max_model_len": 513}, "beyond the model's context of 512 tokens"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_model_len": "4k"}, "max_model_len must be a positive integer, got '4k'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer"),
        ({"block_size": 0}, "block_size must be a positive integer"),
        ({"dtype": "int3"}, "dtype must be"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"kv_cache_memory": "2 potatoes"}, "2 potatoes"),
        ({"kv_cache_memory": 100}, "hold no block"),
        ({"kv_cache_memory": "900000TiB"}, "does not fit into memory"),
        ({"kv_cache_dtype": "int3"}, "int3"),
        ({"attention_backend": "nope"}, "'nope' is not registered"),
        ({"scheduling_policy": "random"}, "random"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must be at least 0"),
        ({"tokenizer_mode": "fancy"}, "fancy"),
        ({"load_format": "pickle"}, "load_format must be"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be"),
        ({"generation_config": "mine"}, "generation_config must be"),
        ({"seed": "abc"}, "seed"),
        ({"max_logprobs": "many"}, "max_logprobs"),
        ({"prefix_cache_key": "text"}, "prefix_cache_key"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named_with_its_limit(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(tiny, **options)
    assert message in str(caught.value)


def test_a_backend_without_kv_in_int8_refuses_it(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference: KV dtype int8 .has only the dtype of the model"):
        Engine(tiny, kv_cache_dtype="int8", attention_backend="reference")
