"""quantization="int8" and others: the tokens of the numbers that the codes stand for, in less memory; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpage import CheckpointError, ConfigError, Engine, PluginRegistry, SamplingParams, hookimpl
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage.api.records import QuantizationSchemeRecord
from kvpage.config import EngineOptions
from kvpage.inspect.checkpoint import planned_model
from kvpage.inspect.plan import Devices, plan_memory
from kvpage.loading.memory import Arena
from kvpage.loading.readers import open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.families import llama
from kvpage.models.hf_config import HFConfig
from kvpage_int8.schemes import Int4, Int4WeightOnly, Int8, Int8WeightOnly
from tiny_checkpoint import write_checkpoint

PROMPTS = [[1, 5, 9, 20], [1, 30, 31, 32, 33, 34, 35], [1, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(model: Any, **options: Any) -> list[list[int]]:
    with Engine(model, skip_tokenizer_init=True, num_kv_blocks=64, **options) as engine:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
        return [list(output.outputs[0].token_ids) for output in outputs]


def weight_bytes(model: Path, dtype: str, scheme: QuantScheme | None) -> int:
    """Bytes of the arena that the weights take."""
    definition = llama.translate(HFConfig.from_folder(model), max_model_len=None)
    arena = Arena()
    load_weights(
        definition,
        open_checkpoint(model),
        dtype=getattr(torch, dtype),
        device="cpu",
        arena=arena,
        scheme=scheme,
    )
    return arena.allocated_bytes


def make(folder: Path, architecture: str, **config: Any) -> tuple[Any, Path]:
    import transformers

    kind = getattr(transformers, architecture)
    values = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**{**values, **config})).float().eval()
    model.save_pretrained(folder)
    return model, folder


def rounded(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """What int8 makes of a stored matrix, float32."""
    outputs = weight.t() if transposed else weight
    scale = outputs.abs().amax(1, keepdim=True) / 127
    found = (outputs / scale).round() * scale
    return (found.t() if transposed else found).contiguous()


@pytest.mark.parametrize(
    ("architecture", "config", "transposed", "plain"),
    [
        ("LlamaForCausalLM", {}, False, ()),
        ("Phi3ForCausalLM", {}, False, ()),
        ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}, True, ("wpe",)),
        ("MixtralForCausalLM", {"num_local_experts": 4}, False, (".gate.",)),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_dequantized_weights(
    tmp_path: Path, architecture: str, config: dict[str, Any], transposed: bool, plain: tuple[str, ...]
) -> None:
    _, folder = make(tmp_path / "plain", architecture, **config)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not any(part in name for part in plain):
            tensors[name] = rounded(tensor, transposed and ".h." in name)
    copy = tmp_path / "rounded"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, copy / "model.safetensors")
    assert tokens(folder, quantization="int8-weight-only") == tokens(copy)
    assert tokens(folder) != tokens(copy) or architecture == "GPT2LMHeadModel"


@pytest.mark.parametrize("whole", [True, False], ids=["all", "without head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["int8-weight-only", "int4-weight-only"])
def test_head_and_embedding_are_those_of_the_dequantized_form(
    tmp_path: Path, name: str, tied: bool, whole: bool
) -> None:
    _, folder = make(tmp_path / "plain", "LlamaForCausalLM", hidden_size=64, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    scheme = {"int8-weight-only": Int8WeightOnly, "int4-weight-only": Int4WeightOnly}[name]()
    for module, tensor in tensors.items():
        if tensor.dim() == 2 and (whole or "layers" in module):
            outputs, inputs = tensor.shape
            spec = LinearSpec(name=module, parameters=(), in_features=inputs, out_features=outputs)
            tensors[module] = scheme.to_form(spec, {"weight": tensor}).dequantize()
    copy = tmp_path / "rounded"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, copy / "model.safetensors")
    options = {} if whole else {"quantization_config": {"quantize_head": False}}
    assert tokens(folder, quantization=name, **options) == tokens(copy)


def test_a_tied_head_is_computed_from_the_embeddings_own_form(tmp_path: Path) -> None:
    _, folder = make(tmp_path / "m", "LlamaForCausalLM", hidden_size=64, tie_word_embeddings=True)
    definition = llama.translate(HFConfig.from_folder(folder), max_model_len=None)
    loaded = load_weights(
        definition, open_checkpoint(folder), dtype=torch.float32, device="cpu", arena=Arena(), scheme=Int4()
    )
    assert isinstance(loaded.weights["embed.weight"], GroupedInt)
    assert "head.weight" not in loaded.weights


def test_options_that_the_scheme_does_not_take_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", hidden_size=64, tokenizer=False)
    unknown = refused(folder, quantization="int8", quantization_config={"head": False})
    assert unknown == "ConfigError: quantization_config has 'head', unknown to 'int8'; it takes quantize_head"
    assert "quantize_head must be true or false, got 'no'" in refused(
        folder, quantization="int4", quantization_config={"quantize_head": "no"}
    )
    assert "quantization names none" in refused(folder, quantization_config={"quantize_head": False})
    assert "must be a mapping" in refused(folder, quantization="int8", quantization_config=["quantize_head"])


def test_a_living_model_is_quantized_into_a_copy(tmp_path: Path) -> None:
    model, folder = make(tmp_path / "plain", "LlamaForCausalLM")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tokens(model, quantization="int8") == tokens(folder, quantization="int8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plan_and_the_engine_agree_on_what_a_scheme_saves(tmp_path: Path, dtype: str, tied: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 200, "vocab_size": 500}
    _, folder = make(tmp_path / "m", "LlamaForCausalLM", tie_word_embeddings=tied, **sizes)
    found = {}
    for name, scheme in {None: None, "int8": Int8, "int4": Int4, "int4-weight-only": Int4WeightOnly}.items():
        for head in (True, False):
            config = None if head else {"quantize_head": False}
            if name is None and config is not None:
                continue
            options = EngineOptions(model=folder, dtype=dtype, quantization=name, quantization_config=config)
            planned = plan_memory(
                planned_model(options, PluginRegistry()), options, Devices(kind="cpu", memory=2**33)
            )
            assert planned.cannot_run_yet == ()
            found[name, head] = weight_bytes(
                folder, dtype, None if scheme is None else scheme(quantize_head=head)
            )
            assert planned.weights.total_bytes == pytest.approx(found[name, head], rel=0.002)
    assert found["int4", True] < found["int8", True] < found["int8", False] < found[None, True]
    assert found["int4", True] < found["int4", False]


def refused(model: Any, **options: Any) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Engine(model, skip_tokenizer_init=True, num_kv_blocks=16, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def quantized(folder: Path, **stated: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder


def test_what_cannot_be_quantized_so_is_refused_with_a_way_out(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", tokenizer=False)
    packed = quantized(write_checkpoint(tmp_path / "packed", tokenizer=False), quant_method="exl3", bits=4)
    unknown = refused(plain, quantization="sevenbit")
    assert unknown.startswith("CheckpointError:")
    assert "is not quantized, and quantization='sevenbit' is no registered scheme" in unknown
    assert "int8 (quantizes plain weights)" in unknown
    assert refused(plain, quantization="awq").startswith("CheckpointError:")
    assert "kvpage_quantization_schemes" in unknown
    nobody = refused(packed)
    assert nobody.startswith("CheckpointError:")
    assert "quantized (exl3)" in nobody
    assert "quantized (exl3)" in refused(packed, quantization="int8")


def test_options_are_not_for_a_checkpoint_that_states_its_own(tmp_path: Path) -> None:
    packed = quantized(
        write_checkpoint(tmp_path / "packed", tokenizer=False), quant_method="half_int8", bits=8
    )
    registry = PluginRegistry(plugins=[HalvesPlugin()], entry_points=False)
    said = refused(
        packed, plugins=registry, quantization="halves", quantization_config={"quantize_head": False}
    )
    assert "states its own" in said


class Halves(QuantScheme):
    """Reads "halves" checkpoints: ``name.codes`` int8 [out, in], each worth half."""

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Halves:
        if config.get("bits") != 8:
            raise CheckpointError(f"halves has 8 bits, quantization_config says {config.get('bits')}")
        return cls()

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if linear.name == "lm_head":
            return {}
        return {
            "codes": TensorSpec(shape=(linear.out_features, linear.in_features), dtype="int8", shard_dim=0)
        }

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        return ChannelInt8(codes=tensors["codes"], scales=torch.full((linear.out_features,), 0.5))


class HalvesPlugin:
    """Registers it."""

    @hookimpl
    def kvpage_quantization_schemes(self) -> list[QuantizationSchemeRecord]:
        return [
            QuantizationSchemeRecord(
                name="halves", factory=f"{__name__}:Halves", methods=("half_int8",), bits=8
            )
        ]


def test_a_plugins_format_is_read_by_the_name_the_checkpoint_states(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", tokenizer=False)
    tensors = load_file(plain / "model.safetensors")
    packed = quantized(
        write_checkpoint(tmp_path / "packed", tokenizer=False), quant_method="half_int8", bits=8
    )
    codes, values = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            code = (tensor * 8).round().clamp(-127, 127)
            codes[name.removesuffix("weight") + "codes"] = code.to(torch.int8)
            values[name] = code * 0.5
        else:
            codes[name] = values[name] = tensor
    save_file(codes, packed / "model.safetensors")
    save_file(values, plain / "model.safetensors")
    registry = PluginRegistry(plugins=[HalvesPlugin()], entry_points=False)
    assert tokens(packed, plugins=registry) == tokens(plain)
    assert tokens(packed, plugins=registry, quantization="halves") == tokens(plain)
    assert "contradicts" in refused(packed, plugins=registry, quantization="int8")
    assert "load_format='dummy'" in refused(packed, plugins=registry, load_format="dummy")
    assert "is not quantized" in refused(plain, plugins=registry, quantization="halves")
    assert "says 4" in refused(quantized(packed, quant_method="half_int8", bits=4), plugins=registry)
