"""bitsandbytes' formats pass the suite of quantization schemes; what the forms are."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_writer import CONFIG, four_bit, int8, sample

from kvpage.api.quant import ChannelInt8, Codebook, Dense
from kvpage.loading.quantized import read_form
from kvpage.testing.checkpoints import QuantSample, linear, read_folder
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_int8.bitsandbytes import BitsAndBytes
from kvpage_int8.plugin import kvpage_quantization_schemes

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
VECTORS = Path(__file__).parents[1] / "data" / "quant"
SHAPES: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "fp4 in blocks of 128, double quantized": {"kind": "fp4", "blocksize": 128, "nested": 256},
    "nf4 stored as bfloat16": {"kind": "nf4", "storage": torch.bfloat16},
    "fp4 stored as float32": {"kind": "fp4", "storage": torch.float32},
    "nf4 in one block": {"kind": "nf4", "blocksize": 2**16},
    "fp4 double quantized in short runs": {"kind": "fp4", "nested": 8},
}


@functools.cache
def samples() -> dict[str, QuantSample]:
    config = {**CONFIG, "bnb_4bit_quant_type": "nf4"}
    other = {**CONFIG, "load_in_4bit": False, "load_in_8bit": True}
    wrong = (
        {**config, "load_in_8bit": True},
        {**config, "load_in_4bit": "yes"},
        {**config, "bnb_4bit_quant_type": "af4"},
        {**config, "bnb_4bit_quant_type": "fp4"},
        other,
    )
    found = {
        name: sample(
            {Q: four_bit(16, 128, **shape), DOWN: four_bit(24, 192, **shape)},
            {**config, "bnb_4bit_quant_type": shape["kind"]},
        )
        for name, shape in SHAPES.items()
    }
    found["blocks across rows"] = sample({Q: four_bit(16, 96, "nf4"), DOWN: four_bit(12, 40, "nf4")}, config)
    found["odd rows"] = sample({Q: four_bit(8, 33, "nf4"), DOWN: four_bit(7, 35, "nf4", nested=4)}, config)
    found["int8"] = sample(
        {Q: int8(16, 40), DOWN: int8(24, 64)}, other, wrong_configs=({**other, "load_in_4bit": True}, config)
    )
    tensors = read_folder(VECTORS / "bnb-nf4-layer")[1]
    specs = (linear("model.layers.0.self_attn.k_proj", 64, 128), linear(DOWN, 128, 256))
    found["written by bitsandbytes"] = QuantSample(
        config=config, tensors=tensors, linears=specs, wrong_configs=wrong
    )
    return found


class TestBitsAndBytes(QuantSchemeConformance):
    scheme = BitsAndBytes

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from samples().items()


@pytest.mark.parametrize("name", samples())
def test_the_sketch_has_the_forms_shapes_and_dtypes(name: str) -> None:
    given = samples()[name]
    scheme = BitsAndBytes.from_checkpoint(given.config, given.view())
    for spec in given.linears:
        form, sketch = read_form(scheme, spec, given.view()), scheme.sketch(spec, given.view())
        assert form is not None
        assert sketch is not None
        assert type(sketch) is type(form)
        assert sketch.nbytes == form.nbytes
        assert [(t.shape, t.dtype) for t in sketch.tensors()] == [(t.shape, t.dtype) for t in form.tensors()]
        assert all(tensor.is_meta for tensor in sketch.tensors())
    assert scheme.sketch(given.plain[0] if given.plain else linear("lm_head", 8, 8), given.view()) is None


def test_four_bits_stay_four_bits() -> None:
    given = samples()["nf4"]
    form = read_form(BitsAndBytes.from_checkpoint(given.config, given.view()), given.linears[0], given.view())
    assert isinstance(form, Codebook)
    assert form.group == 64
    assert form.nbytes == 16 * 128 // 2 + 16 * 2 * 4 + 16 * 4


@pytest.mark.parametrize(("inputs", "kind"), [(96, Codebook), (33, Dense)])
def test_blocks_that_cross_rows_stay_packed_unless_bytes_do_too(inputs: int, kind: type) -> None:
    given = sample({Q: four_bit(6, inputs, "nf4")}, CONFIG)
    form = read_form(BitsAndBytes.from_checkpoint(CONFIG, given.view()), given.linears[0], given.view())
    assert isinstance(form, kind)
    if isinstance(form, Codebook):
        assert form.group == 32


def test_one_shared_scale_may_be_stated_for_more_blocks_than_there_are() -> None:
    stored, values = four_bit(16, 128, "nf4", nested=2**40)
    view = sample({Q: (stored, values)}, CONFIG).view()
    form = read_form(BitsAndBytes(view), linear(Q, 16, 128), view)
    assert form is not None
    assert torch.equal(form.dequantize(), torch.from_numpy(values))


def test_int8_is_computed_with_activations_as_they_are() -> None:
    given = samples()["int8"]
    form = read_form(BitsAndBytes.from_checkpoint(given.config, given.view()), given.linears[0], given.view())
    assert isinstance(form, ChannelInt8)
    assert form.activation == "none"


def test_int8_of_the_first_releases_states_no_layout() -> None:
    given = sample({Q: int8(16, 40)}, {**CONFIG, "load_in_4bit": False, "load_in_8bit": True})
    view = given.view(**{f"{Q}.weight_format": None})
    form = read_form(BitsAndBytes.from_checkpoint(given.config, view), given.linears[0], view)
    assert form is not None
    assert torch.equal(form.dequantize(), given.oracle[Q])


def test_modules_of_both_kinds_are_read_where_the_config_states_none() -> None:
    given = sample({Q: int8(16, 40), DOWN: four_bit(8, 64, "fp4")}, {"quant_method": "bitsandbytes"})
    scheme = BitsAndBytes.from_checkpoint(given.config, given.view())
    for spec in given.linears:
        form = read_form(scheme, spec, given.view())
        assert form is not None
        assert torch.equal(form.dequantize(), given.oracle[spec.name])


def test_it_is_registered_for_its_quant_method() -> None:
    record = next(r for r in kvpage_quantization_schemes() if r.name == "bitsandbytes")
    assert record.methods == ("bitsandbytes",)
    assert record.factory == f"kvpage_int8.bitsandbytes:{BitsAndBytes.__name__}"
