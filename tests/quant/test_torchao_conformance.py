"""torchao's formats pass the suite of quantization schemes; what the forms are."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch
from torchao_writer import CONFIG, Recipe, sample, stored

from kvpage.api.quant import ChannelInt8, Fp8, GroupedInt, WeightForm
from kvpage.loading.quantized import read_form
from kvpage.testing.checkpoints import QuantSample, linear
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_int8.plugin import kvpage_quantization_schemes
from kvpage_int8.torchao import TorchAO

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
INT8, FP8 = "Int8Tensor", "Float8Tensor"
ROW, WHOLE = (1, 0), (0, 0)
RECIPES = {
    "int4": Recipe(),
    "int4 symmetric": Recipe(symmetric=True),
    "int4 an output": Recipe(block=ROW),
    "int4 with zeros as floats": Recipe(zeros=torch.bfloat16),
    "int4 by blocks of outputs": Recipe(block=(4, 32), scales=torch.float32),
    "int2": Recipe(bits=2, scales=torch.float16),
    "int1": Recipe(bits=1, symmetric=True),
    "int6": Recipe(bits=6),
    "intx 8 an output": Recipe(bits=8, block=ROW, symmetric=True),
    "intx 8 in groups": Recipe(bits=8),
    "int8": Recipe(kind=INT8, bits=8, block=ROW, symmetric=True, scales=torch.float32),
    "int8, one scale": Recipe(kind=INT8, bits=8, block=WHOLE, symmetric=True, scales=torch.float32),
    "int8 in groups": Recipe(kind=INT8, bits=8, symmetric=True, scales=torch.float32),
    "int8 static": Recipe(
        kind=INT8, bits=8, block=ROW, symmetric=True, scales=torch.float32, activations=True, static=True
    ),
    "fp8": Recipe(kind=FP8, block=ROW, scales=torch.float32),
    "fp8, one scale": Recipe(kind=FP8, block=WHOLE, scales=torch.float32),
    "fp8 in blocks": Recipe(kind=FP8, block=(4, 32), scales=torch.float32),
}


@functools.cache
def samples() -> dict[str, QuantSample]:
    wrong = ({"quant_method": "torchao"}, {**CONFIG, "quant_type": None}, {**CONFIG, "quant_type": 4})
    found = {
        name: sample({Q: stored(16, 128, recipe), DOWN: stored(24, 192, recipe)}, wrong_configs=wrong)
        for name, recipe in RECIPES.items()
    }
    found["odd rows"] = sample(
        {
            Q: stored(8, 33, Recipe(block=ROW, symmetric=True)),
            DOWN: stored(7, 35, Recipe(block=(1, 7))),
        }
    )
    return found


class TestTorchAO(QuantSchemeConformance):
    scheme = TorchAO

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from samples().items()


def form_of(given: QuantSample) -> WeightForm:
    form = read_form(TorchAO.from_checkpoint(given.config, given.view()), given.linears[0], given.view())
    assert form is not None
    return form


@pytest.mark.parametrize("name", samples())
def test_the_sketch_has_the_forms_shapes_and_dtypes(name: str) -> None:
    given = samples()[name]
    scheme = TorchAO.from_checkpoint(given.config, given.view())
    for spec in given.linears:
        form, sketch = read_form(scheme, spec, given.view()), scheme.sketch(spec, given.view())
        assert form is not None
        assert sketch is not None
        assert type(sketch) is type(form)
        assert [(t.shape, t.dtype) for t in sketch.tensors()] == [(t.shape, t.dtype) for t in form.tensors()]
        assert all(tensor.is_meta for tensor in sketch.tensors())
    assert scheme.sketch(given.plain[0], given.view()) is None


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("int4", GroupedInt, 4),
        ("int4 an output", GroupedInt, 4),
        ("int2", GroupedInt, 4),
        ("int6", GroupedInt, 8),
        ("intx 8 in groups", GroupedInt, 8),
        ("int8 in groups", GroupedInt, 8),
        ("intx 8 an output", ChannelInt8, None),
        ("int8", ChannelInt8, None),
        ("int8, one scale", ChannelInt8, None),
        ("fp8", Fp8, None),
    ],
)
def test_the_canonical_form_of_each_class(name: str, kind: type, bits: int | None) -> None:
    form = form_of(samples()[name])
    assert type(form) is kind
    assert getattr(form, "bits", None) == bits


def test_zero_points_are_kept_only_where_some_are_not_zero() -> None:
    plain, shifted = form_of(samples()["int4 symmetric"]), form_of(samples()["int4"])
    assert isinstance(plain, GroupedInt)
    assert isinstance(shifted, GroupedInt)
    assert plain.zeros is None
    assert shifted.zeros is not None
    assert plain.nbytes == 16 * 64 + 16 * 4 * 2


@pytest.mark.parametrize(
    ("recipe", "activation"),
    [
        (Recipe(kind=INT8, bits=8, block=ROW, symmetric=True, scales=torch.float32), "none"),
        (
            Recipe(kind=INT8, bits=8, block=ROW, symmetric=True, scales=torch.float32, activations=True),
            "per-token",
        ),
        (Recipe(bits=8, block=ROW, symmetric=True), "none"),
        (Recipe(bits=8, block=ROW, symmetric=True, activations=True), "per-token"),
        (Recipe(), "per-group"),
        (Recipe(bits=8), "none"),
    ],
)
def test_activations_are_rounded_where_the_file_says_so(recipe: Recipe, activation: str) -> None:
    form = form_of(sample({Q: stored(16, 128, recipe)}))
    assert isinstance(form, (ChannelInt8, GroupedInt))
    assert form.activation == activation


def test_a_quantized_embedding_is_read_too() -> None:
    given = sample({"model.embed_tokens": stored(24, 64, Recipe(bits=8, block=ROW, symmetric=True))})
    scheme = TorchAO.from_checkpoint(given.config, given.view())
    form = read_form(scheme, linear("model.embed_tokens", 24, 64, "embed.weight"), given.view())
    assert TorchAO.quantizes_tables
    assert form is not None
    assert torch.equal(form.dequantize(), given.oracle["model.embed_tokens"])


def test_scales_that_serve_all_inputs_are_whole_on_every_rank() -> None:
    given = samples()["int8"]
    scheme = TorchAO.from_checkpoint(given.config, given.view())
    by_outputs, by_inputs = (scheme.tensors(spec, given.view()) for spec in given.linears)
    assert [by_outputs[part].shard_dim for part in ("_weight_qdata", "_weight_scale")] == [0, 0]
    assert [by_inputs[part].shard_dim for part in ("_weight_qdata", "_weight_scale")] == [1, None]


def test_a_scale_without_dimensions_serves_the_whole_matrix() -> None:
    own = stored(8, 16, Recipe(kind=FP8, block=WHOLE, scales=torch.float32))
    given = sample({Q: own})
    view = given.view(**{f"{Q}._weight_scale": own.tensors["_weight_scale"].reshape(())})
    form = read_form(TorchAO.from_checkpoint(CONFIG, view), given.linears[0], view)
    assert form is not None
    assert torch.equal(form.dequantize(), given.oracle[Q])


def test_it_is_registered_for_its_quant_method() -> None:
    record = next(r for r in kvpage_quantization_schemes() if r.name == "torchao")
    assert record.methods == ("torchao",)
    assert record.factory == f"kvpage_int8.torchao:{TorchAO.__name__}"
