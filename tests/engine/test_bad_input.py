"""Bad input is a typed error that names value, limit and way out; the engine goes on, and nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_state import MakeEngine
from safetensors.torch import load_file, save_file

from kvpage import CheckpointError, Engine, RequestError, SamplingParams
from tiny_checkpoint import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
VOCABULARY = 380


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    changed = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def refused(folder: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Engine(folder, **options)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no/such folder" in refused(str(tmp_path / "no/such folder"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path)


def test_a_config_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in refused(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors" in refused(folder)


def test_a_git_lfs_pointer_is_named_as_one(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "git lfs pull" in refused(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weights(folder, model__norm__weight=None)
    assert "model.norm.weight" in refused(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    change_weights(folder, model__norm__weight=torch.ones(31))
    message = refused(folder)
    assert "model.norm.weight" in message
    assert "31" in message
    assert "32" in message


def test_an_unknown_architecture_is_named_with_those_known(folder: Path) -> None:
    change_config(folder, architectures=["MambaForCausalLM"])
    message = refused(folder)
    assert "MambaForCausalLM" in message
    assert "llama" in message


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -3, "many", None])
def test_a_senseless_config_value_is_named(folder: Path, name: str, value: Any) -> None:
    change_config(folder, **{name: value})
    assert name in refused(folder)


def test_no_tokenizer_names_the_ways_out(tmp_path: Path) -> None:
    message = refused(write_checkpoint(tmp_path / "bare", tokenizer=False))
    assert "skip_tokenizer_init=True" in message


def test_a_quantized_checkpoint_is_refused_by_name(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "exl3", "bits": 4})
    assert "exl3" in refused(folder)


def test_an_object_that_is_no_model_is_refused() -> None:
    with pytest.raises(Exception, match="model must be a folder") as caught:
        Engine(42)
    assert type(caught.value).__name__ == "ConfigError"


BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "empty text": ("", {}, "prompt", "empty"),
    "no tokens": ([[]], {}, "prompt", "empty"),
    "too long": (list(range(5, 205)) * 3, {}, "prompt", "maximum context length is 512"),
    "just too long": ([7] * 512, {}, "prompt", "at most 511"),
    "id beyond the vocabulary": (
        [5, VOCABULARY],
        {},
        "prompt",
        "380 is out of vocabulary: the model has 380",
    ),
    "negative id": ([5, -1], {}, "prompt", "-1 is out of vocabulary"),
    "huge id": ([2**70], {}, "prompt", "out of vocabulary"),
    "bytes": (b"text", {}, "prompt", "b'text'"),
    "floats": ([[1.5]], {}, "prompt", "1.5"),
    "booleans": ([[True, False]], {}, "prompt", "True"),
    "a number": (5, {}, "prompt", "int"),
    "a nested list of texts": ([["a", "b"]], {}, "prompt", "'a'"),
    "nothing": ([None], {}, "prompt", "None"),
    "an empty mapping": ({}, {}, "prompt", "prompt_token_ids"),
    "an unknown key": ({"prompt": "x", "images": []}, {}, "prompt", "images"),
    "a lone surrogate": ("\ud800", {}, "prompt", "surrogate"),
    "salt of a wrong type": (
        {"prompt": "x", "cache_salt": 5},
        {},
        "cache_salt",
        "cache_salt must be str, got int",
    ),
    "stop token beyond": ("x", {"stop_token_ids": [380]}, "stop_token_ids", "380"),
    "bias beyond": ("x", {"logit_bias": {999: 1.0}}, "logit_bias", "999"),
    "allowed beyond": ("x", {"allowed_token_ids": [5, 999]}, "allowed_token_ids", "999"),
    "logprobs beyond": ("x", {"logprobs": 21}, "logprobs", "max_logprobs=20"),
    "prompt logprobs beyond": ("x", {"prompt_logprobs": 21}, "prompt_logprobs", "max_logprobs=20"),
    "unknown processor": (
        "x",
        {"logits_processors": ["nope"]},
        "logits_processors",
        "'nope' is not registered",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_named_and_the_engine_goes_on(engine: Engine, name: str) -> None:
    prompt, changes, param, message = BAD_REQUESTS[name]
    with pytest.raises(RequestError) as caught:
        engine.generate(prompt, GREEDY.clone(**changes))
    assert caught.value.param == param
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert len(engine.generate("x", GREEDY)[0].outputs[0].token_ids) == 4


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "min_tokens": {"min_tokens": 5, "max_tokens": 4},
    "n": {"n": 2, "temperature": 0.0},
    "stop": {"stop": "x", "detokenize": False},
    "allowed_token_ids": {"allowed_token_ids": []},
    "temperature": {"temperature": -1.0},
    "top_p": {"top_p": 0.0},
    "top_k": {"top_k": -2},
    "min_p": {"min_p": 1.5},
    "max_tokens": {"max_tokens": 0},
    "repetition_penalty": {"repetition_penalty": 0.0},
    "presence_penalty": {"presence_penalty": 3.0},
    "seed": {"seed": 2**64},
    "timeout": {"timeout": 0.0},
    "logit_bias": {"logit_bias": {1: float("nan")}},
    "bad_words": {"bad_words": [""]},
    "extra_args": {"extra_args": 5},
    "logits_processors": {"logits_processors": [print]},
}


@pytest.mark.parametrize("param", CONTRADICTIONS)
def test_contradictory_parameters_are_refused_when_made(param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**CONTRADICTIONS[param])
    assert caught.value.param == param


def test_logit_bias_with_text_keys_says_what_keys_are() -> None:
    with pytest.raises(RequestError, match=r"keys of logit_bias must be token ids .* got '5'"):
        SamplingParams(logit_bias={"5": 1.0})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "prompt", [torch.tensor([5, 6]), torch.tensor([5, 6]).numpy()], ids=["torch", "numpy"]
)
def test_an_array_as_a_prompt_names_the_way_out(engine: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError, match="tolist"):
        engine.submit(prompt, GREEDY)


@pytest.mark.parametrize(
    ("keyword", "value"), [("request_id", 5), ("priority", "high"), ("priority", None), ("cache_salt", b"x")]
)
def test_arguments_of_a_wrong_type_are_refused(engine: Engine, keyword: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        engine.submit("x", GREEDY, **{keyword: value})
    assert caught.value.param == keyword


def test_params_of_a_wrong_type_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="params must be SamplingParams, got dict"):
        engine.generate("x", {"max_tokens": 4})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="params has 2 entries for 1 prompts"):
        engine.generate("x", [GREEDY, GREEDY])


def test_a_request_that_can_never_fit_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=4, block_size=4)
    with pytest.raises(RequestError, match="16 tokens") as caught:
        engine.generate([5] * 10, GREEDY.clone(max_tokens=20))
    assert caught.value.param == "max_tokens"
    with pytest.raises(RequestError) as caught:
        engine.generate([5] * 30, GREEDY)
    assert caught.value.param == "prompt"
    assert engine.generate([5] * 10, GREEDY.clone(max_tokens=7))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("bad", ["", [7] * 600, [999]], ids=["empty", "too long", "out of vocabulary"])
def test_a_list_with_one_bad_prompt_leaves_nothing_behind(engine: Engine, bad: Any, position: int) -> None:
    prompts: list[Any] = ["The", "Paged"]
    prompts.insert(position, bad)
    before = engine.stats()
    with pytest.raises(RequestError):
        engine.generate(prompts, GREEDY)
    after = engine.stats()
    assert (after.running, after.waiting, after.used_blocks) == (0, 0, 0)
    assert after.steps == before.steps, "nothing was computed for a list that is refused"


def test_messages_of_a_wrong_form_are_refused(engine: Engine) -> None:
    for messages in ([], [[]], [{"content": "no role"}], [5]):
        with pytest.raises(RequestError):
            engine.chat(messages, GREEDY)  # type: ignore[arg-type]
