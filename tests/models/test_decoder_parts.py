"""What a Decoder hands to others: sinks to the attention backend, a layer to a plugin's mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from dense_context import DenseContext
from small_specs import ATTENTION, DECODER, HIDDEN, MLP, RMS, VOCAB, named, three_layers

from kvpage.api.model import AttentionSpec, DecoderEnv, DecoderSpec, LayerSpec, StepContext
from kvpage.api.parameters import parameters
from kvpage.api.quant import Dense, WeightForm
from kvpage.loading.memory import Arena
from kvpage.loading.readers import DummyView
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder

ENV = DecoderEnv(device="cpu", dtype="float32")


def random_weights(spec: DecoderSpec) -> dict[str, WeightForm]:
    generator = torch.Generator().manual_seed(3)
    return {p.name: Dense(torch.randn(p.shape, generator=generator) * 0.3) for p in parameters(spec)}


@torch.inference_mode()
def run(spec: DecoderSpec, weights: Mapping[str, WeightForm], ctx: StepContext) -> torch.Tensor:
    decoder = Decoder(spec, weights, ENV)
    return decoder.logits(decoder.forward(torch.arange(6), torch.arange(6), ctx))


def test_sinks_reach_the_backend_in_float32_and_change_the_result() -> None:
    seen: list[torch.Tensor | None] = []

    class Recording(DenseContext):
        def attend(self, spec: AttentionSpec, *args: Any) -> torch.Tensor:
            seen.append(args[3])
            return super().attend(spec, *args)

    spec = replace(DECODER, layers=three_layers(replace(ATTENTION, sinks=True)))
    weights = random_weights(spec)
    with_sinks = run(spec, weights, Recording(torch.arange(6)))
    assert all(sinks is not None and sinks.dtype == torch.float32 and sinks.shape == (4,) for sinks in seen)
    plain = replace(DECODER, layers=three_layers())
    assert not torch.allclose(run(plain, weights, DenseContext(torch.arange(6))), with_sinks)


def test_learned_positions_start_at_the_offset() -> None:
    embedding = replace(DECODER.embedding, positions=8, position_offset=2)
    spec = replace(DECODER, layers=three_layers(replace(ATTENTION, rope=None)), embedding=embedding)
    weights = random_weights(spec)
    shifted = dict(weights)
    table = weights["positions.weight"].dequantize()
    assert table.shape == (10, HIDDEN)
    shifted["positions.weight"] = Dense(table[2:])
    unshifted = replace(spec, embedding=replace(embedding, position_offset=0))
    ctx = DenseContext(torch.arange(6))
    assert torch.equal(run(spec, weights, ctx), run(unshifted, shifted, ctx))


@dataclass(frozen=True)
class RunningMean:
    """A mixer of a plugin: each token becomes the mean of all tokens so far, times a learned gain."""

    kv_group: int = 0
    kv_index: int = 0

    def parameters(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        return {"gain": (hidden_size,)}

    def build(self, weights: Mapping[str, WeightForm], env: DecoderEnv) -> Any:
        gain = weights["gain"].dequantize()

        def mix(x: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
            return x.cumsum(0) / (positions[:, None] + 1) * gain

        return mix


def test_a_plugins_mixer_runs_in_the_place_of_attention() -> None:
    layer = LayerSpec(mixer=RunningMean(), ffn=MLP, mixer_norm_before=RMS, ffn_norm_before=RMS)
    spec = replace(DECODER, layers=(layer,))
    weights = random_weights(spec)
    assert weights["layers.0.mixer.gain"].shape == (HIDDEN,)
    logits = run(spec, weights, DenseContext(torch.arange(6)))
    silent = {**weights, "layers.0.mixer.gain": Dense(torch.zeros(HIDDEN))}
    assert logits.shape == (6, VOCAB)
    assert not torch.allclose(run(spec, silent, DenseContext(torch.arange(6))), logits)


def test_no_logit_rows_give_an_empty_result() -> None:
    spec = replace(DECODER, layers=three_layers())
    assert Decoder(spec, random_weights(spec), ENV).logits(torch.zeros(0, HIDDEN)).shape == (0, VOCAB)


def test_dummy_weights_run_and_are_the_same_at_every_load() -> None:
    definition = named(replace(DECODER, layers=three_layers()))
    before = torch.get_rng_state()
    loads = [
        load_weights(
            definition, DummyView(definition), dtype=torch.float32, device="cpu", arena=Arena()
        ).weights
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (run(definition.spec, weights, DenseContext(torch.arange(6))) for weights in loads)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0
