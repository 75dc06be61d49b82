"""From tensors to weights: merging, dtypes, sharing, and errors that name file, tensor, expected and found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpage.api.model import DecoderEnv, ModelDefinition
from kvpage.api.parameters import parameters
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena
from kvpage.loading.readers import ModuleView, open_checkpoint
from kvpage.loading.weights import LoadedWeights, load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.families import llama
from kvpage.models.hf_config import HFConfig
from kvpage.nn.rotary import build_rope

CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_bias": True,
}


def define(**values: Any) -> ModelDefinition:
    return llama.translate(HFConfig({**CONFIG, **values}), max_model_len=None)


def make_tensors(definition: ModelDefinition, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors of random values, by its own names."""
    generator = torch.Generator().manual_seed(0)
    return {
        definition.weights[p.name].name: torch.randn(p.shape, generator=generator).to(dtype)
        for p in parameters(definition.spec)
    }


def load(
    folder: Path, definition: ModelDefinition, dtype: torch.dtype = torch.float32, **options: Any
) -> LoadedWeights:
    return load_weights(
        definition, open_checkpoint(folder), dtype=dtype, device="cpu", arena=Arena(), **options
    )


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_float_dtype_is_converted_to_every_other(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    definition = define()
    tensors = make_tensors(definition, stored)
    save(tmp_path, tensors)
    for name, form in load(tmp_path, definition, wanted).weights.items():
        expected = tensors[definition.weights[name].name].to(wanted)
        assert form.tensor.dtype == wanted
        assert torch.equal(form.tensor, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_block_lie_in_one_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    definition = define()
    save(tmp_path, make_tensors(definition))
    weights = load(tmp_path, definition, dtype).weights
    for module, parts in (("attention", "qkv"), ("mlp", ("gate", "up"))):
        first, *others = (weights[f"layers.1.{module}.{part}.weight"] for part in parts)
        assert first.join(others) is not None
    q, k, v = (weights[f"layers.1.attention.{part}.bias"] for part in "qkv")
    assert q.join([k, v]) is not None


def test_tensors_read_in_many_slices_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = define()
    tensors = make_tensors(definition)
    save(tmp_path, tensors)
    monkeypatch.setattr("kvpage.loading.readers.SLICE_BYTES", 300)
    for name, form in load(tmp_path, definition).weights.items():
        assert torch.equal(form.tensor, tensors[definition.weights[name].name]), name


def test_progress_counts_the_bytes_to_the_end(tmp_path: Path) -> None:
    definition = define()
    tensors = make_tensors(definition)
    save(tmp_path, tensors)
    calls: list[tuple[int, int]] = []
    load(tmp_path, definition, torch.bfloat16, progress=lambda done, total: calls.append((done, total)))
    total = 2 * sum(tensor.numel() for tensor in tensors.values())
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_a_missing_tensor_names_file_tensor_and_shape(tmp_path: Path) -> None:
    tensors = make_tensors(define())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(tmp_path, tensors)
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape \[24, 16\] is missing",
    ):
        load(tmp_path, define())


def test_a_wrong_shape_names_file_tensor_expected_and_found(tmp_path: Path) -> None:
    tensors = make_tensors(define())
    tensors["model.norm.weight"] = torch.ones(17)
    save(tmp_path, tensors)
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: tensor 'model\.norm\.weight' should have shape \[16\] .* found \[17\]",
    ):
        load(tmp_path, define())


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    tensors = make_tensors(define())
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int8)
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is int8; .* quantization_config"):
        load(tmp_path, define())


def test_unused_tensors_are_told_of_and_known_buffers_are_not(tmp_path: Path) -> None:
    tensors = make_tensors(define())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save(tmp_path, tensors)
    assert load(tmp_path, define()).warnings == ()
    tensors["model.layers.0.extra"] = torch.ones(2)
    save(tmp_path, tensors)
    (warning,) = load(tmp_path, define()).warnings
    assert warning == "1 tensors of the checkpoint are not used by this model: model.layers.0.extra"


def test_a_checkpoint_of_the_bare_model_needs_no_prefix(tmp_path: Path) -> None:
    definition = define(tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): tensor for name, tensor in make_tensors(definition).items()}
    save(tmp_path, tensors)
    assert torch.equal(
        load(tmp_path, definition).weights["embed.weight"].tensor, tensors["embed_tokens.weight"]
    )


def test_a_tied_head_is_read_only_where_it_differs_from_the_embedding(tmp_path: Path) -> None:
    definition = define(tie_word_embeddings=True)
    tensors = make_tensors(definition)
    embedding = tensors["model.embed_tokens.weight"]
    save(tmp_path, {**tensors, "lm_head.weight": embedding.clone()})
    same = load(tmp_path, definition)
    assert "head.weight" not in same.weights
    assert same.warnings == ()
    save(tmp_path, {**tensors, "lm_head.weight": embedding + 1})
    assert torch.equal(load(tmp_path, definition).weights["head.weight"].tensor, embedding + 1)
    del tensors["model.embed_tokens.weight"]
    save(tmp_path, {**tensors, "lm_head.weight": embedding})
    assert torch.equal(load(tmp_path, definition).weights["embed.weight"].tensor, embedding)


class Module:
    """As much of a transformers model as is needed."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._tensors


def test_a_living_models_tensors_are_shared_not_copied() -> None:
    definition, arena = define(), Arena()
    tensors = make_tensors(definition)
    loaded = load_weights(
        definition, ModuleView(Module(tensors)), dtype=torch.float32, device="cpu", arena=arena
    )
    for name, form in loaded.weights.items():
        assert form.tensor.data_ptr() == tensors[definition.weights[name].name].data_ptr()
    assert arena.allocated_bytes == 0


def test_a_living_model_of_another_dtype_is_copied_and_left_alone() -> None:
    definition = define()
    tensors = make_tensors(definition)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    loaded = load_weights(
        definition, ModuleView(Module(tensors)), dtype=torch.bfloat16, device="cpu", arena=Arena()
    )
    for name, form in loaded.weights.items():
        assert torch.equal(form.tensor, before[definition.weights[name].name].bfloat16())
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_the_hosts_default_dtype_and_device_do_not_matter(tmp_path: Path) -> None:
    definition = define()
    tensors = make_tensors(definition)
    save(tmp_path, tensors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = load(tmp_path, definition)
            decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))
            rope = build_rope(definition.spec.layers[0].mixer.rope, 8, "cpu")
            logits = decoder.logits(torch.ones(3, CONFIG["hidden_size"], dtype=torch.float32, device="cpu"))
    finally:
        torch.set_default_dtype(before)
    assert {form.tensor.device.type for form in loaded.weights.values()} == {"cpu"}
    assert {form.tensor.dtype for form in loaded.weights.values()} == {torch.float32}
    assert (rope.cos.dtype, rope.cos.device.type) == (torch.float32, "cpu")
    assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")


def test_the_file_is_not_written(tmp_path: Path) -> None:
    definition = define()
    tensors = make_tensors(definition)
    save(tmp_path, tensors)
    for form in load(tmp_path, definition).weights.values():
        form.tensor.zero_()
    assert all(
        torch.equal(tensor, tensors[name])
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    )
