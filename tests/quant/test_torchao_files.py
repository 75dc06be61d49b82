"""What is wrong with a torchao file is a CheckpointError that names the weight, what was expected and found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao_writer import Recipe, Stored, sample, stored

from kvpage import CheckpointError
from kvpage.loading.quantized import read_form
from kvpage.testing.checkpoints import QuantSample, TensorsView
from kvpage_int8.torchao import TorchAO

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
INT4 = stored(16, 128, Recipe())
INT8 = stored(16, 128, Recipe(kind="Int8Tensor", bits=8, block=(1, 0), symmetric=True, scales=torch.float32))
FP8 = stored(16, 128, Recipe(kind="Float8Tensor", block=(1, 0), scales=torch.float32))


def view_of(
    checkpoint: QuantSample, metadata: str | None = None, **changes: torch.Tensor | None
) -> TensorsView:
    """Its view with another entry in the header, and other tensors by suffix."""
    named = {f"{MODULE}.{suffix}": tensor for suffix, tensor in changes.items()}
    said = checkpoint.metadata if metadata is None else {**checkpoint.metadata, WEIGHT: metadata}
    tensors = {name: t for name, t in {**checkpoint.tensors, **named}.items() if t is not None}
    return TensorsView(tensors, said)


def refused(own: Stored, message: str, metadata: str | None = None, **changes: torch.Tensor | None) -> None:
    checkpoint = sample({MODULE: own})
    for view, good in ((view_of(checkpoint), True), (view_of(checkpoint, metadata, **changes), False)):
        scheme = TorchAO.from_checkpoint(checkpoint.config, view)
        if good:
            assert read_form(scheme, checkpoint.linears[0], view) is not None
            continue
        with pytest.raises(CheckpointError, match=message) as caught:
            read_form(scheme, checkpoint.linears[0], view)
        assert "the sample" in str(caught.value)
        assert MODULE in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "Int4Tensor",
        "Int4TilePackedTo4dTensor",
        "Int4PlainInt32Tensor",
        "MXTensor",
        "NVFP4Tensor",
        "AffineQuantizedTensor",
    ],
)
def test_other_classes_are_refused_by_name(kind: str) -> None:
    refused(
        INT4,
        f"{kind}.*kvpage reads Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor",
        said(INT4, _type=kind),
    )


def said(own: Stored, data: dict[str, Any] | None = None, **changes: object) -> str:
    return json.dumps({**own.said, "_data": {**own.said["_data"], **(data or {})}, **changes})


BAD_HEADERS: dict[str, tuple[Stored, str, str]] = {
    "a plain tensor": (INT4, json.dumps({"_type": "Tensor"}), "expected a plain tensor .*found _weight_qdata"),
    "no JSON": (INT4, "Int8Tensor", "expected metadata that describes a tensor in JSON"),
    "no object": (INT4, "[1]", "expected metadata that describes a tensor in JSON"),
    "no class": (INT4, "{}", "expected metadata that describes a tensor in JSON"),
    "nested beyond measure": (INT4, "[" * 60_000, "expected metadata that describes a tensor in JSON"),
    "beyond measure": (INT4, " " * 2**16 + "1", "expected metadata of at most 65536 bytes, found 65537"),
    "no zero points": (
        INT4,
        said(INT4, _tensor_data_names=["qdata", "scale"]),
        "expected metadata that names _weight_qdata, _weight_scale, _weight_zero_point",
    ),
    "no scales": (FP8, said(FP8, _tensor_data_names=["qdata"]), "names _weight_qdata, _weight_scale, found"),
    "a block that does not divide": (INT4, said(INT4, {"block_size": [1, 48]}), r"divides \[16, 128\], found \[1, 48\]"),
    "a block of nothing": (INT4, said(INT4, {"block_size": [0, 32]}), r"divides \[16, 128\], found \[0, 32\]"),
    "a block of three dimensions": (INT4, said(INT4, {"block_size": [1, 1, 32]}), r"found \[1, 1, 32\]"),
    "no block": (INT4, said(INT4, {"block_size": None}), "expected block_size as a list of sizes, found None"),
    "a block in words": (INT4, said(INT4, {"block_size": ["1", "32"]}), "expected block_size as a list of sizes"),
    "unsigned integers": (INT4, said(INT4, {"target_dtype": {"_data": "uint4"}}), "expected target_dtype of int1, .*uint4"),
    "no target": (INT4, said(INT4, {"target_dtype": None}), "expected target_dtype of int1, .*found None"),
    "other blocks than the scales": (INT4, said(INT4, {"block_size": [1, 64]}), r"shape \[16, 2\].*found \[16, 4\]"),
    "a narrower target": (INT4, said(INT4, {"target_dtype": {"_data": "int2"}}), "whole numbers from -2 to 1, found -8 to 7"),
    "activations scaled beforehand": (
        INT8,
        said(INT8, _tensor_data_names=["qdata", "scale", "zero_point", "act_pre_scale"]),
        "act_pre_scale .*quantize without it",
    ),
    "a tensor that is not there": (
        INT8,
        said(INT8, _tensor_data_names=["qdata", "scale", "act_quant_scale"]),
        "_weight_act_quant_scale': expected a tensor that the header's metadata names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers(name: str) -> None:
    own, metadata, message = BAD_HEADERS[name]
    refused(own, message, metadata)


def test_a_header_without_the_weight() -> None:
    checkpoint = sample({MODULE: INT4})
    view = TensorsView(checkpoint.tensors, {})
    with pytest.raises(
        CheckpointError, match=rf"expected metadata under '{WEIGHT}' in the file's header, found none"
    ):
        read_form(TorchAO.from_checkpoint(checkpoint.config, view), checkpoint.linears[0], view)


BAD_TENSORS: dict[str, tuple[Stored, dict[str, torch.Tensor | None], str]] = {
    "no codes": (INT4, {"_weight_qdata": None}, r"_weight_qdata' of shape \[16, 128\], int8, is missing"),
    "no scales": (INT4, {"_weight_scale": None}, "_weight_scale': expected a tensor that the header's metadata names"),
    "no zero points": (INT4, {"_weight_zero_point": None}, "_weight_zero_point': expected a tensor"),
    "codes of another shape": (INT4, {"_weight_qdata": INT4.tensors["_weight_qdata"].t()}, r"found \[128, 16\]"),
    "codes as int32": (INT4, {"_weight_qdata": INT4.tensors["_weight_qdata"].int()}, "int8.*found .*int32"),
    "codes beyond 4 bits": (INT4, {"_weight_qdata": torch.full((16, 128), 8).to(torch.int8)}, "from -8 to 7, found 8 to 8"),
    "zero points beyond 4 bits": (
        INT4, {"_weight_zero_point": torch.full((16, 4), -9).to(torch.int8)}, "_weight_zero_point.*from -8 to 7, found -9",
    ),
    "zero points between codes": (INT4, {"_weight_zero_point": torch.full((16, 4), 0.5)}, "whole numbers from -8 to 7"),
    "zero points of NaN": (INT4, {"_weight_zero_point": torch.full((16, 4), torch.nan)}, "whole numbers from -8 to 7"),
    "scales of NaN": (INT4, {"_weight_scale": torch.full((16, 4), torch.nan)}, "_weight_scale': expected finite scales"),
    "infinite scales": (INT8, {"_weight_scale": torch.full((16, 1), torch.inf)}, "_weight_scale': expected finite scales"),
    "negative scales": (INT8, {"_weight_scale": torch.full((16, 1), -1.0)}, "expected finite scales of at least 0"),
    "scales as integers": (INT8, {"_weight_scale": torch.ones(16, 1).int()}, "float32.*found .*int32"),
    "fp8 scales of 16 bits": (FP8, {"_weight_scale": torch.ones(16, 1).half()}, "float32.*found .*float16"),
    "fp8 of NaN": (
        FP8, {"_weight_qdata": torch.full((16, 128), torch.nan).to(torch.float8_e4m3fn)}, "expected finite numbers, found NaN",
    ),
    "fp8 of negative NaN": (
        FP8, {"_weight_qdata": torch.full((16, 128), 255).to(torch.uint8).view(torch.float8_e4m3fn)}, "found NaN",
    ),
    "fp8 of five exponent bits": (
        FP8, {"_weight_qdata": torch.zeros(16, 128).to(torch.float8_e5m2)}, "float8_e4m3fn.*found .*float8_e5m2",
    ),
    "a plain weight besides": (INT4, {"weight": torch.zeros(16, 128)}, "stored both quantized .* and plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str) -> None:
    own, changes, message = BAD_TENSORS[name]
    refused(own, message, **changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.text(max_size=200)
    | st.dictionaries(st.sampled_from(["_type", "_data", "_tensor_data_names"]), JSON, min_size=1).map(
        lambda changes: json.dumps({**INT4.said, **changes})
    )
    | st.dictionaries(st.sampled_from(["block_size", "target_dtype"]), JSON, min_size=1).map(
        lambda changes: said(INT4, changes)
    )
)
def test_whatever_a_header_says_it_is_read_or_refused(metadata: str) -> None:
    checkpoint = sample({MODULE: INT4})
    view = view_of(checkpoint, metadata)
    scheme = TorchAO.from_checkpoint(checkpoint.config, view)
    try:
        form = read_form(scheme, checkpoint.linears[0], view)
    except CheckpointError:
        return
    assert form is not None
    assert bool(form.dequantize().isfinite().all())
