"""The config reader: names old and new, types, and errors that name the file, the key and the value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpage.errors import CheckpointError
from kvpage.models.families import llama, mistral, qwen2, qwen3
from kvpage.models.hf_config import GenerationDefaults, HFConfig

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = [llama, mistral, qwen2, qwen3]


def config(**values: Any) -> HFConfig:
    return HFConfig({**TINY, **values}, source="config.json")


def test_old_and_new_names_say_the_same() -> None:
    old = config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16")
    new = config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, dtype="bfloat16")
    assert llama.translate(old, max_model_len=None) == llama.translate(new, max_model_len=None)
    assert old.dtype == new.dtype == "bfloat16"


def test_rope_parameters_a_layer_type_are_read_by_that_type() -> None:
    cfg = config(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    assert cfg.rope_parameters("full_attention")["rope_theta"] == 1e6
    assert cfg.rope_parameters("sliding_attention")["rope_type"] == "default"
    with pytest.raises(CheckpointError, match="full_attention, sliding_attention, not 'other'"):
        cfg.rope_parameters("other")


def test_the_text_part_of_a_multimodal_config_is_what_is_read() -> None:
    nested = HFConfig(
        {"architectures": ["X"], "hidden_size": 1, "text_config": {**TINY, "architectures": ["Y"]}}
    )
    assert nested.count("hidden_size") == 32
    assert nested.architectures == ("X",)


def test_a_transformers_config_object_reads_like_its_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.Qwen2Config(
        **TINY, num_key_value_heads=2, use_sliding_window=True, max_window_layers=2
    )
    made.save_pretrained(tmp_path)
    from_file = qwen2.translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    assert qwen2.translate(HFConfig.from_object(made), max_model_len=None) == from_file


def test_ints_floats_and_bools_are_told_apart() -> None:
    cfg = HFConfig({"whole": 3.0, "half": 0.5, "flag": True, "text": "7"}, source="f")
    assert cfg.get(int, "whole") == 3
    assert isinstance(cfg.get(int, "whole"), int)
    assert cfg.get(float, "whole") == 3.0
    assert cfg.get(bool, "flag") is True
    for kind, key in [(int, "half"), (int, "flag"), (float, "flag"), (int, "text"), (bool, "whole")]:
        with pytest.raises(CheckpointError, match=f"f: key '{key}' must be of type {kind.__name__}"):
            cfg.get(kind, key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_no_int(value: float) -> None:
    with pytest.raises(CheckpointError, match="must be of type int"):
        HFConfig({"n": value}).get(int, "n")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_missing_or_absurd_size_names_file_and_key(family: Any, key: str) -> None:
    values = {k: v for k, v in {**TINY, "num_key_value_heads": 4}.items() if k != key}
    with pytest.raises(CheckpointError, match=f"config.json: key '{key}' is missing; expected: int"):
        family.translate(HFConfig(values, source="config.json"), max_model_len=None)
    with pytest.raises(CheckpointError, match=f"config.json: key '{key}' must be at least 1, found -2"):
        family.translate(config(num_key_value_heads=4, **{key: -2}), max_model_len=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "swiglu9"}, "'hidden_act' is 'swiglu9'; kvpage has gelu"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type 'spiral' is unknown; kvpage has default"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "key 'factor' must be of type float, found '2'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "key 'factor' must be above 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope_type 'llama3' needs 'low_freq_factor'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope short_factor must have 4 values, found 1",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": 3}},
            "key 'long_factor' must be of type list, found 3",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "key 'original_max_position_embeddings' must be above 0, found 0",
        ),
        ({"rope_theta": -1.0}, "key 'rope_theta' must be above 0, found -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not used by this family"),
        ({"tie_word_embeddings": "yes"}, "key 'tie_word_embeddings' must be of type bool, found 'yes'"),
    ],
)
def test_a_value_that_cannot_be_run_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llama.translate(config(**values), max_model_len=None)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        ({}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [8, None, 8, None],
        ),
    ],
)
def test_qwen_windows(values: dict[str, Any], windows: list[int | None]) -> None:
    spec = qwen2.translate(config(num_key_value_heads=2, **values), max_model_len=None).spec
    assert [layer.mixer.window for layer in spec.layers] == windows
    for index, layer in enumerate(spec.layers):
        group = spec.kv_groups[layer.mixer.kv_group]
        assert group.layers[layer.mixer.kv_index] == index
        assert group.window == layer.mixer.window
        assert group.kind == ("full" if group.window is None else "window")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must have 4 entries"),
        (
            {"layer_types": ["mamba"] * 4},
            "layer_types has mamba; kvpage has full_attention, sliding_attention",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "give no window"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        qwen2.translate(config(num_key_value_heads=2, **values), max_model_len=None)


def test_mistrals_window_is_4096_unless_it_says_otherwise() -> None:
    def windows(**values: Any) -> set[int | None]:
        spec = mistral.translate(config(num_key_value_heads=2, **values), max_model_len=None).spec
        return {layer.mixer.window for layer in spec.layers}

    assert windows() == {4096}
    assert windows(sliding_window=None) == {None}
    assert windows(sliding_window=16) == {16}


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff", "[" * 100_000])
def test_a_damaged_config_json_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        HFConfig.from_folder(tmp_path)


def test_a_folder_without_config_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the folder"):
        HFConfig.from_folder(tmp_path)


def test_special_tokens_are_one_many_or_none() -> None:
    assert config(eos_token_id=[5, 6], bos_token_id=1).eos_token_ids == (5, 6)
    assert config(eos_token_id=5).eos_token_ids == (5,)
    assert config(eos_token_id=None).eos_token_ids == ()
    assert config(bos_token_id=1).bos_token_id == 1
    assert config().bos_token_id is None


def test_generation_defaults_take_what_is_sound_and_leave_junk(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    stated = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": "high",
        "min_p": True,
        "eos_token_id": [3, "x", -1, 4],
        "max_new_tokens": 2.5,
        "do_sample": True,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(
        temperature=0.6, top_k=20, eos_token_ids=(3, 4)
    )
    (tmp_path / "generation_config.json").write_text("{")
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()


def test_reading_a_family_imports_no_torch() -> None:
    code = "import sys; from kvpage.models.families import llama, mistral, qwen2, qwen3; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
