"""The four schemes pass the suite of quantization schemes; what they promise beyond it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch

from kvpage import ConfigError
from kvpage.api.quant import ChannelInt8, GroupedInt, LinearSpec, WeightForm
from kvpage.testing.checkpoints import QuantSample, linear
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_int8.plugin import kvpage_quantization_schemes
from kvpage_int8.schemes import Int4, Int4WeightOnly, Int8, Int8WeightOnly, OnTheFly

SCHEMES = {"int8": Int8, "int8-weight-only": Int8WeightOnly, "int4": Int4, "int4-weight-only": Int4WeightOnly}


@functools.cache
def grouped_weights() -> QuantSample:
    """Inputs of which 128, 64, 32 or none of them is a divisor; many outputs and few."""
    generator = torch.Generator().manual_seed(1)
    specs = (
        linear("model.layers.0.self_attn.q_proj", 5, 640),
        linear("model.layers.0.self_attn.k_proj", 3, 192),
        linear("model.layers.0.self_attn.v_proj", 7, 96),
        linear("model.layers.0.self_attn.o_proj", 128, 256),
        linear("model.layers.0.mlp.up_proj", 9, 48),
        linear("model.layers.0.mlp.gate_proj", 2100, 256),
        linear("model.embed_tokens", 33, 128, "embed.weight"),
        linear("lm_head", 33, 128, "head.weight"),
    )
    tensors = {
        f"{s.name}.weight": torch.randn(s.out_features, s.in_features, generator=generator).bfloat16()
        for s in specs
    }
    plain = (
        linear("model.layers.0.mlp.gate", 8, 64, "layers.0.moe.router.weight"),
        linear("model.layers.0.mlp.shared_expert_gate", 1, 64, "layers.0.moe.shared_gate.weight"),
    )
    return QuantSample(config={}, tensors=tensors, linears=specs, plain=plain)


class OnTheFlyConformance(QuantSchemeConformance):
    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from super().samples()
        yield "groups", grouped_weights()


class TestInt8(OnTheFlyConformance):
    scheme = Int8
    plain_error = 0.5 / 127 + 1e-6


class TestInt8WeightOnly(OnTheFlyConformance):
    scheme = Int8WeightOnly
    plain_error = 0.5 / 127 + 1e-6


class TestInt4(OnTheFlyConformance):
    """A value opposite to the extreme one may be cut to 7 of 9.5 steps."""

    scheme = Int4
    plain_error = 0.3


class TestInt4WeightOnly(OnTheFlyConformance):
    scheme = Int4WeightOnly
    plain_error = 0.3


def form_of(scheme: type[OnTheFly], spec: LinearSpec, weight: torch.Tensor) -> WeightForm:
    return scheme().to_form(spec, {"weight": weight})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_activations_may_be_quantized_unless_the_name_says_weight_only(scheme: type[OnTheFly]) -> None:
    dynamic = scheme in (Int8, Int4)
    for inputs in (96, 48):
        form = form_of(scheme, linear("q_proj", 4, inputs), torch.ones(4, inputs))
        grouped = issubclass(scheme, Int4) and inputs == 96
        assert isinstance(form, GroupedInt if grouped else ChannelInt8)
        expected = ("per-group" if grouped else "per-token") if dynamic else "none"
        assert form.activation == expected


@pytest.mark.parametrize(
    ("inputs", "group"), [(128, 128), (640, 128), (192, 64), (320, 64), (96, 32), (48, None), (17, None)]
)
def test_int4_takes_the_largest_group_that_divides_or_int8(inputs: int, group: int | None) -> None:
    form = form_of(Int4, linear("q_proj", 2, inputs), torch.ones(2, inputs))
    assert (form.group if isinstance(form, GroupedInt) else None) == group
    if isinstance(form, GroupedInt):
        assert (form.bits, form.zero, form.offsets, form.scales.dtype) == (4, 8, None, torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("parameter", ["embed.weight", "head.weight"])
def test_head_and_embedding_are_left_out_on_request(scheme: type[OnTheFly], parameter: str) -> None:
    sample = grouped_weights()
    spec = next(s for s in sample.linears if s.parameters == (parameter,))
    other = sample.linears[0]
    assert scheme().tensors(spec, sample.view())
    left = scheme.from_checkpoint({"quantize_head": False}, sample.view())
    assert not left.tensors(spec, sample.view())
    assert left.tensors(other, sample.view())


@pytest.mark.parametrize("config", [{"head": False}, {"quantize_head": "no"}, {"quantize_head": None}])
def test_options_that_are_none_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="quantize_head"):
        Int8.from_checkpoint(config, grouped_weights().view())


def test_each_scheme_is_registered_under_its_name() -> None:
    records = {record.name: record for record in kvpage_quantization_schemes() if not record.methods}
    assert records.keys() == SCHEMES.keys()
    for name, record in records.items():
        assert record.factory == f"kvpage_int8.schemes:{SCHEMES[name].__name__}"
