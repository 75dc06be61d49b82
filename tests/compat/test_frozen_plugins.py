"""Plugins written against an older kvpage.api keep working, whatever has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import plugin_api_1_0 as frozen
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpage import Engine, PluginRegistry, SamplingParams
from kvpage.cli.main import main
from tiny_checkpoint import write_checkpoint

DIGESTS = {"plugin_api_1_0.py": "615811f5bc8219f98aec2b34cce19dd2f18aff61f1e87e603a98fd9b9bda38c6"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (20, 3, 9)]
NAMES = {
    "embed_tokens": "embed", "norm": "final_norm", "lm_head": "head", "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v", "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    "input_layernorm": "mixer_norm_before", "post_attention_layernorm": "ffn_norm_before",
}  # fmt: skip


@pytest.fixture
def registry() -> PluginRegistry:
    return PluginRegistry(plugins=[frozen], entry_points=False, strict=True)


@pytest.fixture
def frozen_folder(tmp_path: Path) -> Path:
    """A checkpoint that only the frozen plugin's reader and family can open."""
    plain = write_checkpoint(tmp_path / "plain")
    folder = tmp_path / "frozen"
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["FrozenForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(plain / "model.safetensors")
    torch.save({frozen_name(name): tensor for name, tensor in tensors.items()}, folder / "model.frozen")
    return folder


def frozen_name(name: str) -> str:
    """kvpage's name of a Llama parameter, under which the frozen family looks for it."""
    *place, module = next((name.removeprefix("model.").removesuffix(f"{key}.weight"), NAMES[key])
                          for key in NAMES if name.endswith(f"{key}.weight") and fits(name, key))  # fmt: skip
    return f"{''.join(place)}{module}.weight"


def fits(name: str, key: str) -> bool:
    before = name.removesuffix(f"{key}.weight")
    return before == "" or before.endswith(".")


def test_a_frozen_plugin_was_not_edited() -> None:
    for name, digest in DIGESTS.items():
        content = (Path(__file__).parent / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, (
            f"{name} is what others wrote: mend kvpage instead"
        )


def test_everything_it_brings_is_registered(registry: PluginRegistry) -> None:
    status = next(s for s in registry.statuses() if s.name == "plugin_api_1_0")
    assert (status.status, status.reason) == ("active", "")
    hooks = [name for name in vars(frozen) if name.startswith("kvpage_")]
    assert len(status.records) == len(hooks) - 1, "one record a hook; the selecting hook returns none"


def test_an_engine_made_of_its_parts_gives_the_tokens_of_the_reference(
    registry: PluginRegistry, frozen_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    scheme = frozen.Scheme()
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = scheme.to_form(None, {"weight": tensor}).dequantize()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    with Engine(str(tmp_path / "plain"), dtype="float32", skip_tokenizer_init=True) as reference:
        expected = [output.outputs[0].token_ids for output in reference.generate(PROMPTS, GREEDY)]
    with Engine(
        str(frozen_folder),
        plugins=registry,
        quantization="frozen",
        scheduling_policy="frozen",
        dtype="float32",
        skip_tokenizer_init=True,
    ) as engine:
        assert engine.config.block_size == 8, "the attention backend is not the frozen one"
        assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)] == expected


def test_its_logits_processor_and_listener_work(
    registry: PluginRegistry, heard: list[tuple[object, ...]]
) -> None:
    params = GREEDY.clone(max_tokens=7, logits_processors=["frozen"])
    with Engine("demo", plugins=registry, dtype="float32", skip_tokenizer_init=True) as engine:
        outputs = engine.generate(PROMPTS, params)
    assert all(output.outputs[0].token_ids == [5, 6, 7, 5, 6, 7, 5] for output in outputs)
    ends = [event for event in heard if event[0] == "finished"]
    assert [event[2:] for event in ends] == [(0, "length", 7)] * len(PROMPTS)
    assert len([event for event in heard if event[0] == "completed"]) == len(PROMPTS)


@pytest.fixture
def heard() -> Iterator[list[tuple[object, ...]]]:
    frozen.Listener.heard.clear()
    yield frozen.Listener.heard
    frozen.Listener.heard.clear()


def test_its_command_runs(
    registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVPAGE_PLUGINS", "+plugin_api_1_0")
    assert main(["frozen", "--now"]) == 0
    assert capsys.readouterr().out == "frozen --now\n"
