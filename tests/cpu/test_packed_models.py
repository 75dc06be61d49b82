"""Models whose weights are packed in many ways at once run natively, and as what their weights stand for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from kvpage.api.decoder import Reasons
from kvpage.api.model import CausalLM, DecoderEnv, DecoderSpec
from kvpage.api.parameters import parameters
from kvpage.api.quant import ChannelInt8, Codebook, Dense, Fp8, GroupedInt, WeightForm
from kvpage.testing.decoder_models import sample_specs, sample_weights
from kvpage.testing.decoder_oracle import exact_hidden, exact_logits, exact_weights
from kvpage.testing.decoder_rig import DecoderRig, Row
from kvpage.testing.linear_kernels import ForeignForm
from kvpage_cpu.attention import CpuAttention
from kvpage_cpu.decoder import CpuDecoder
from kvpage_cpu.native import ISA_VARIABLE, ISAS, available_isas
from kvpage_cpu.packing import why_not

TOLERANCES = {"float32": 2e-4, "bfloat16": 1.5e-1}


def grouped(bits: int, group: int, *, permuted: bool = False, **options: object) -> Callable[..., WeightForm]:
    def make(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
        size = group if inputs % group == 0 else inputs
        scales = torch.rand(outputs, inputs // size, generator=random).half() * 0.7 / 2**bits
        zeros = torch.randint(0, 2**bits, scales.shape, generator=random).to(torch.uint8)
        return GroupedInt(
            codes=torch.randint(0, 256, (outputs, inputs * bits // 8), generator=random, dtype=torch.uint8),
            scales=scales, group=size, bits=bits, zero=2 ** (bits - 1),
            zeros=zeros if options.get("zeros") else None,
            permutation=torch.randperm(inputs, generator=random).int() if permuted else None,
            activation="per-group" if options.get("dynamic") else "none",
        )  # fmt: skip

    return make


def channel(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
    codes = torch.randint(-127, 128, (outputs, inputs), generator=random, dtype=torch.int8)
    return ChannelInt8(codes=codes, scales=torch.rand(outputs, generator=random) / 2, factor=1 / 127)


def codebook(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
    group = 16 if inputs % 16 == 0 else inputs
    return Codebook(
        codes=torch.randint(0, 256, (outputs, inputs // 2), generator=random, dtype=torch.uint8),
        scales=torch.rand(outputs, inputs // group, generator=random) / 2,
        table=torch.linspace(-1, 1, 16) ** 3,
        group=group,
    )


def fp8(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
    codes = (torch.randn(outputs, inputs, generator=random) * 10).to(torch.float8_e4m3fn)
    return Fp8(codes=codes, scales=torch.rand(outputs, 1, generator=random) / 50, group=inputs)


def foreign(random: torch.Generator, outputs: int, inputs: int) -> WeightForm:
    return ForeignForm(torch.randn(outputs, inputs, generator=random) / 5)


MAKERS = (
    grouped(4, 32, dynamic=True), channel, grouped(4, 32, permuted=True, zeros=True), codebook, fp8,
    grouped(4, 32), grouped(8, 16, zeros=True), grouped(4, 16, permuted=True), grouped(8, 16), foreign,
)  # fmt: skip


def weights_of(
    spec: DecoderSpec, dtype: str, makers: tuple[Callable[..., WeightForm], ...]
) -> dict[str, WeightForm]:
    """Each linear layer and table gets the next form, so that q, k and v, and gate and up, differ."""
    random = torch.Generator().manual_seed(3)
    made, weights = cycle(makers), sample_weights(spec, getattr(torch, dtype), merged=True)
    for parameter in parameters(spec):
        if parameter.kind == "linear" or parameter.name == "embed.weight":
            weights[parameter.name] = next(made)(random, *parameter.shape)
    return weights


def built(spec: DecoderSpec, dtype: str, weights: dict[str, WeightForm], *, owned: bool = False) -> CausalLM:
    model = CpuDecoder().build(spec, weights, DecoderEnv(device="cpu", dtype=dtype, weights_owned=owned))
    assert not isinstance(model, Reasons), model
    return model


def rig_of(spec: DecoderSpec, dtype: str) -> DecoderRig:
    lengths = [14, 5, 19]
    return DecoderRig(spec, CpuAttention, device="cpu", dtype=dtype, block_size=16, lengths=lengths)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("model", ["llama", "biased-qk-norm", "parallel", "shared-expert"])
def test_products_of_forms_that_differ(
    model: str, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in available_isas():
        pytest.skip(f"no {isa} here")
    if dtype == "bfloat16" and "expert" in model:
        pytest.skip("in a narrow dtype a token may be routed to another expert than in float64")
    monkeypatch.setenv(ISA_VARIABLE, isa)
    spec = sample_specs(8)[model]
    weights = weights_of(spec, dtype, MAKERS)
    decoder, rig = built(spec, dtype, weights), rig_of(spec, dtype)
    hidden = rig.step(decoder, [Row(0, 0, 14), Row(1, 0, 5), Row(2, 0, 19)])[0]
    exact = exact_weights(weights)
    expected = exact_hidden(spec, exact, rig.token_ids[0])
    assert ((hidden - expected).abs() <= TOLERANCES[dtype] * (1 + expected.abs())).all()
    with torch.inference_mode():
        logits = decoder.logits(hidden)
    wanted = exact_logits(spec, exact, hidden.double())
    assert ((logits - wanted).abs() <= TOLERANCES[dtype] * (1 + wanted.abs())).all()
    alone = rig_of(spec, dtype).step(decoder, [Row(0, 0, 14)])[0]
    assert torch.equal(alone, hidden), "a row's bits do not depend on its neighbours"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_weights_of_the_engine_are_packed_where_they_lie(dtype: str) -> None:
    spec = sample_specs(8)["llama"]
    steps = []
    for owned in (False, True):
        decoder = built(spec, dtype, weights_of(spec, dtype, MAKERS), owned=owned)
        steps.append(rig_of(spec, dtype).step(decoder, [Row(0, 0, 14)])[0])
    assert torch.equal(*steps)


def test_a_form_without_a_kernel_is_held_as_plain_numbers_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = sample_specs(8)["llama"]
    weights = weights_of(spec, "bfloat16", (foreign, grouped(4, 8), grouped(4, 32)))
    with caplog.at_level(logging.WARNING, "kvpage"):
        decoder = built(spec, "bfloat16", weights)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "one line a reason"
    assert all(" MB of weights are plain bfloat16 natively: " in line for line in said)
    assert {"held as ForeignForm" in line for line in said} == {True, False}
    assert {"groups of 8 (" in line for line in said} == {True, False}
    caplog.clear()
    plain = {
        name: Dense(form.dequantize().bfloat16()) if form.shape[1:] and why_not(form) else form
        for name, form in weights.items()
    }
    same = built(spec, "bfloat16", plain)
    assert not caplog.records
    row = [Row(0, 0, 14)]
    assert torch.equal(
        rig_of(spec, "bfloat16").step(decoder, row)[0], rig_of(spec, "bfloat16").step(same, row)[0]
    )
