"""From a scheme's tensors to forms: shared matrices, adjacency, checks before anything is read, and whose fault it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvpage.api.model import ModelDefinition
from kvpage.api.parameters import parameters
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    Dense,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage.errors import CheckpointError, PluginError
from kvpage.loading.memory import Arena
from kvpage.loading.quantized import sketch
from kvpage.loading.readers import DummyView, ModuleView, open_checkpoint
from kvpage.loading.weights import LoadedWeights, load_weights
from kvpage.models.families import gpt2, llama, phi3
from kvpage.models.hf_config import HFConfig
from kvpage_int8.rounding import Rounder
from kvpage_int8.schemes import Int4, Int8

CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
QKV = "model.layers.1.self_attn.qkv_proj"


class StoredInt8(QuantScheme):
    """Reads ``name.qweight`` int8 [out, in] and ``name.scales`` float32 [out]; the head and ``plain`` stay plain."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.plain = ("lm_head",)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> StoredInt8:
        return cls()

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if linear.name.endswith(self.plain):
            return {}
        return {
            "qweight": TensorSpec(shape=(linear.out_features, linear.in_features), dtype="int8", shard_dim=0),
            "scales": TensorSpec(shape=(linear.out_features,), dtype="float32", shard_dim=0),
        }

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        self.made.append(linear.name)
        return ChannelInt8(codes=tensors["qweight"], scales=tensors["scales"])


def define(family: Any = llama, **values: Any) -> ModelDefinition:
    definition: ModelDefinition = family.translate(HFConfig({**CONFIG, **values}), max_model_len=None)
    return definition


def packed_tensors(definition: ModelDefinition, scheme: StoredInt8) -> dict[str, torch.Tensor]:
    """A checkpoint of the scheme's format, of random values."""
    view = DummyView(definition)
    generator = torch.Generator().manual_seed(0)
    linear = {definition.weights[p.name].name for p in parameters(definition.spec) if p.kind == "linear"}
    tensors = {}
    for name in view.names():
        module = name.removesuffix(".weight")
        if name not in linear or module.endswith(scheme.plain):
            tensors[name] = view.read(name)
            continue
        shape = view.info(name).shape
        tensors[f"{module}.qweight"] = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        tensors[f"{module}.scales"] = torch.rand(shape[0], generator=generator) * 0.01
    return tensors


def load(
    folder: Path, definition: ModelDefinition, tensors: Any, scheme: QuantScheme | None
) -> LoadedWeights:
    save_file(tensors, folder / "model.safetensors")
    return load_weights(
        definition,
        open_checkpoint(folder),
        dtype=torch.float32,
        device="cpu",
        arena=Arena(),
        scheme=scheme,
    )


def join(weights: Mapping[str, WeightForm], module: str, parts: tuple[str, ...]) -> WeightForm | None:
    first, *others = (weights[f"{module}.{part}.weight"] for part in parts)
    return first.join(others)


def test_parameters_of_one_stored_matrix_are_rows_of_one_form(tmp_path: Path) -> None:
    definition, scheme = define(phi3), StoredInt8()
    tensors = packed_tensors(definition, scheme)
    loaded = load(tmp_path, definition, tensors, scheme)
    assert loaded.warnings == ()
    assert sorted(scheme.made) == sorted(
        {name.removesuffix(".qweight") for name in tensors if "qweight" in name}
    )
    whole = tensors[f"{QKV}.qweight"].float() * tensors[f"{QKV}.scales"].unsqueeze(1)
    joined = join(loaded.weights, "layers.1.attention", ("q", "k", "v"))
    assert isinstance(joined, ChannelInt8)
    assert torch.equal(joined.dequantize(), whole)
    k = loaded.weights["layers.1.attention.k.weight"]
    assert torch.equal(k.dequantize(), whole[16:24])
    assert joined.codes.data_ptr() != tensors[f"{QKV}.qweight"].data_ptr()


def test_a_module_the_scheme_leaves_out_stays_plain_and_its_block_apart(tmp_path: Path) -> None:
    definition, scheme = define(), StoredInt8()
    scheme.plain = ("lm_head", "k_proj")
    weights = load(tmp_path, definition, packed_tensors(definition, scheme), scheme).weights
    kinds = {name: type(form) for name, form in weights.items() if name.startswith("layers.0.attention.")}
    assert [kinds[f"layers.0.attention.{part}.weight"] for part in ("q", "k", "v")] == [
        ChannelInt8,
        Dense,
        ChannelInt8,
    ]
    assert isinstance(weights["head.weight"], Dense)
    assert join(weights, "layers.0.attention", ("q", "k", "v")) is None
    assert join(weights, "layers.0.mlp", ("gate", "up")) is not None


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}.scales": None}, rf"'{NAME}\.scales' of shape \[16\], float32, is missing"),
        ({f"{NAME}.scales": torch.ones(3)}, r"should have shape \[16\], float32, .* found \[3\], float32"),
        (
            {f"{NAME}.scales": torch.ones(16).half()},
            r"should have shape \[16\], float32, .* found \[16\], float16",
        ),
        ({f"{NAME}.weight": torch.ones(16, 24)}, r"stored both quantized \(qweight, scales\) and plain"),
        ({"model.norm.weight": None}, r"'model\.norm\.weight' of shape \[16\] is missing"),
    ],
    ids=["missing", "shape", "dtype", "twice", "plain-missing"],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_read(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    definition, scheme = define(), StoredInt8()
    tensors: dict[str, torch.Tensor | None] = {**packed_tensors(definition, scheme), **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, definition, {name: t for name, t in tensors.items() if t is not None}, scheme)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert scheme.made == []


def test_only_tensors_that_nobody_uses_are_warned_of(tmp_path: Path) -> None:
    definition, scheme = define(), StoredInt8()
    tensors = {**packed_tensors(definition, scheme), f"{NAME}.leftover": torch.ones(24)}
    (warning,) = load(tmp_path, definition, tensors, scheme).warnings
    assert f"1 tensors of the checkpoint are not used by this model: {NAME}.leftover" in warning


class Faulty(StoredInt8):
    """Raises, or makes forms with the rows of another."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        if self.error is not None:
            raise self.error
        return super().to_form(linear, tensors).take(torch.arange(2))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("zeros"), PluginError, r"Faulty failed on 'model\.layers\.0.*KeyError: 'zeros'"),
        (CheckpointError("a bad scale"), CheckpointError, "^a bad scale$"),
        (None, PluginError, r"Faulty made a form of shape \[2, 16\] of '.*', expected \[16, 16\]"),
    ],
    ids=["raises", "refuses", "another-shape"],
)
def test_a_schemes_own_fault_names_the_scheme_and_the_matrix(
    tmp_path: Path, error: Exception | None, kind: type[Exception], message: str
) -> None:
    definition, scheme = define(), Faulty(error)
    with pytest.raises(kind, match=message):
        load(tmp_path, definition, packed_tensors(definition, scheme), scheme)


class Forgetful(StoredInt8):
    """Does not know which tensors it stores."""

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        raise KeyError(linear.name)


class LooksAtNumbers(StoredInt8):
    """Its form depends on what the codes are, and it says nothing beforehand."""

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        if tensors["qweight"].sum().item() == 0:
            raise ValueError("nothing is stored")
        return super().to_form(linear, tensors)


def test_a_plan_hears_of_a_schemes_fault_and_goes_without_a_form_that_needs_numbers(tmp_path: Path) -> None:
    definition = define()
    save_file(packed_tensors(definition, StoredInt8()), tmp_path / "model.safetensors")
    view = open_checkpoint(tmp_path)
    linear = LinearSpec(
        name="model.layers.0.mlp.down_proj",
        parameters=("layers.0.mlp.down.weight",),
        in_features=24,
        out_features=16,
    )
    form = sketch(StoredInt8(), linear, view)
    assert isinstance(form, ChannelInt8)
    assert form.codes.is_meta
    assert sketch(LooksAtNumbers(), linear, view) is None
    with pytest.raises(PluginError, match=r"Forgetful failed on 'model\.layers\.0\.mlp\.down_proj'"):
        sketch(Forgetful(), linear, view)


def exact_int8(weight: torch.Tensor) -> torch.Tensor:
    """float32: each row in 127 steps of its largest magnitude."""
    scale = (weight.abs().amax(1) / 127).unsqueeze(1)
    return torch.where(scale > 0, (weight / scale).round(), torch.zeros(())) * scale


@pytest.mark.parametrize("family", [llama, phi3, gpt2], ids=["apart", "fused", "transposed"])
def test_plain_weights_are_quantized_in_whatever_way_they_are_stored(tmp_path: Path, family: Any) -> None:
    values = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32} if family is gpt2 else {}
    definition = define(family, **values)
    view = DummyView(definition)
    tensors = {name: view.read(name) for name in view.names()}
    weights = load(tmp_path, definition, tensors, Int8()).weights
    plain = load(tmp_path, definition, tensors, None).weights
    quantized = {name for name, form in weights.items() if isinstance(form, ChannelInt8)}
    packed = {p.name for p in parameters(definition.spec) if p.kind == "linear" or p.name == "embed.weight"}
    assert quantized == packed
    for name, form in weights.items():
        weight = plain[name].dequantize()
        assert torch.equal(form.dequantize(), exact_int8(weight) if name in packed else weight), name
    assert isinstance(join(weights, "layers.1.attention", ("q", "k", "v")), ChannelInt8)


def test_a_living_models_weights_are_copied_where_they_are_quantized_and_shared_elsewhere() -> None:
    definition = define()
    source = DummyView(definition)

    class Living:
        def __init__(self) -> None:
            self.tensors = {name: source.read(name) for name in source.names()}

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.tensors

    living = Living()
    before = {name: tensor.clone() for name, tensor in living.tensors.items()}
    loaded = load_weights(
        definition,
        ModuleView(living),
        dtype=torch.float32,
        device="cpu",
        arena=Arena(),
        scheme=Int8(quantize_head=False),
    )
    embed = loaded.weights["embed.weight"]
    assert isinstance(embed, Dense)
    assert embed.tensor.data_ptr() == living.tensors["model.embed_tokens.weight"].data_ptr()
    assert isinstance(loaded.weights["layers.0.mlp.up.weight"], ChannelInt8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in living.tensors.items())


def test_weights_that_are_not_finite_are_not_quantized(tmp_path: Path) -> None:
    definition = define()
    view = DummyView(definition)
    tensors = {name: view.read(name) for name in view.names()}
    tensors[f"{NAME}.weight"][3, 5] = torch.nan
    with pytest.raises(CheckpointError, match=rf"'{NAME}' holds NaN or infinity"):
        load(tmp_path, definition, tensors, Int8())


def test_large_plain_weights_come_in_pieces_and_give_the_form_of_the_whole(tmp_path: Path) -> None:
    definition = define(vocab_size=4000, hidden_size=1024, num_hidden_layers=1)
    view = DummyView(definition)
    tensors = {name: view.read(name) for name in view.names()}
    seen: list[int] = []

    class Watched(Int4):
        def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
            seen.append(linear.out_features)
            return super().to_form(linear, tensors)

    weights = load(tmp_path, definition, tensors, Watched()).weights
    assert max(seen) < 4000
    table = weights["embed.weight"]
    codes, scales = Rounder().groups(tensors["model.embed_tokens.weight"], 128)
    whole = GroupedInt(codes=codes, scales=scales, group=128)
    assert isinstance(table, GroupedInt)
    assert torch.equal(table.dequantize(), whole.dequantize())
    joined = join(weights, "layers.0.attention", ("q", "k", "v"))
    assert isinstance(joined, GroupedInt)
    assert joined.codes.is_contiguous()
    assert joined.codes.data_ptr() == weights["layers.0.attention.q.weight"].tensors()[0].data_ptr()


class Uneven(QuantScheme):
    """Says that it goes row by row, and keeps a tensor (or a type) that does not."""

    quantizes_plain = True
    row_by_row = True

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.calls = 0

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Uneven:
        return cls("")

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        if linear.name != "lm_head":
            return {}
        return {"weight": TensorSpec(shape=(linear.out_features, linear.in_features), dtype="float32")}

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        self.calls += 1
        shape = (linear.out_features, linear.in_features)
        if self.kind == "type":
            codes = torch.zeros(shape, dtype=torch.int8 if self.calls == 1 else torch.int16)
            return ChannelInt8(codes=codes, scales=torch.ones(shape[0]))
        return ChannelInt8(codes=torch.zeros(shape, dtype=torch.int8), scales=torch.ones(1))


@pytest.mark.parametrize("kind", ["type", "tensor"])
def test_forms_that_are_not_row_by_row_are_the_schemes_fault(tmp_path: Path, kind: str) -> None:
    definition = define(vocab_size=4000, hidden_size=1024, num_hidden_layers=1)
    view = DummyView(definition)
    tensors = {name: view.read(name) for name in view.names()}
    with pytest.raises(PluginError, match=r"Uneven failed on 'lm_head' \(TypeError: row_by_row"):
        load(tmp_path, definition, tensors, Uneven(kind))
