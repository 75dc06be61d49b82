"""What is wrong with a bitsandbytes file is a CheckpointError that names the tensor, what was expected and found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from bitsandbytes_writer import CONFIG, four_bit, int8, sample, state_of
from hypothesis import given
from hypothesis import strategies as st

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, LinearSpec
from kvpage.loading.quantized import read_form
from kvpage.loading.readers import open_checkpoint
from kvpage.testing.checkpoints import linear, write_folder
from kvpage_int8.bitsandbytes import BitsAndBytes

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
SPEC = linear(MODULE, 16, 128)
PLAIN, _ = four_bit(16, 128, "nf4")
NESTED, _ = four_bit(16, 128, "nf4", nested=8)
INT8, _ = int8(16, 128)
Change = Mapping[str, torch.Tensor | None]
NAN, NEGATIVE = torch.full((32,), float("nan")), torch.full((32,), -1.0)


def said(tensors: Mapping[str, torch.Tensor] = PLAIN, **changes: object) -> torch.Tensor:
    """The quant_state of ``tensors`` with other values; ``None`` leaves a key out."""
    stated = {**json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist())), **changes}
    return state_of({key: value for key, value in stated.items() if value is not None})


def raw(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def load(view: CheckpointView, spec: LinearSpec = SPEC) -> None:
    assert (
        read_form(BitsAndBytes.from_checkpoint({"quant_method": "bitsandbytes"}, view), spec, view)
        is not None
    )


def refused(tensors: Mapping[str, torch.Tensor], changes: Change, message: str) -> None:
    stored = sample({MODULE: (dict(tensors), torch.zeros(16, 128).numpy())}, CONFIG)
    load(stored.view())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(stored.view(**changes))
    assert "the sample" in str(caught.value)
    assert MODULE in str(caught.value)


OF_PLAIN: dict[str, tuple[Change, str]] = {
    "repacked at the first forward": (
        {f"{WEIGHT}.absmax": torch.ones((2, 16), dtype=torch.bfloat16)},
        r"absmax' should be float32 .*bfloat16 \[2, 16\].*AVX512-BF16.*save it before its first forward",
    ),
    "scales as bfloat16": ({f"{WEIGHT}.absmax": torch.ones(32, dtype=torch.bfloat16)}, "before its first forward"),
    "scales of two dimensions": ({f"{WEIGHT}.absmax": torch.ones((2, 16))}, "before its first forward"),
    "no quant_state": ({STATE: None}, r"bitsandbytes__nf4': expected exactly one quant_state.*no such tensor"),
    "another quant_state": (
        {STATE: None, f"{WEIGHT}.quant_state.bitsandbytes__af4": said()},
        "expected exactly one quant_state, of nf4 or fp4, found .*__af4",
    ),
    "two quant_states": ({f"{WEIGHT}.quant_state.bitsandbytes__fp4": said()}, "found .*__fp4, .*__nf4"),
    "the weight alone": (
        {STATE: None, f"{WEIGHT}.absmax": None, f"{WEIGHT}.quant_map": None},
        "expected the quant_state of 4-bit weights",
    ),
    "no weight": ({WEIGHT: None}, rf"{WEIGHT}': expected a tensor of every 4-bit weight"),
    "no scales": ({f"{WEIGHT}.absmax": None}, "absmax': expected a tensor of every 4-bit weight"),
    "no table": ({f"{WEIGHT}.quant_map": None}, "quant_map': expected a tensor of every 4-bit weight"),
    "too few scales": ({f"{WEIGHT}.absmax": torch.ones(31)}, "expected 32 scales of blocks of 64, found 31"),
    "too many scales": ({f"{WEIGHT}.absmax": torch.ones(33)}, "expected 32 scales of blocks of 64, found 33"),
    "too few bytes": ({WEIGHT: PLAIN["weight"][:-1]}, r"\[1024, 1\], uint8.*found \[1023, 1\]"),
    "bytes as int64": ({WEIGHT: PLAIN["weight"].long()}, r"\[1024, 1\], uint8.*found \[1024, 1\], int64"),
    "a short table": ({f"{WEIGHT}.quant_map": torch.ones(15)}, r"quant_map' should have shape \[16\]"),
    "NaN in the table": ({f"{WEIGHT}.quant_map": NAN[:16]}, "quant_map': expected finite numbers, found NaN"),
    "NaN scales": ({f"{WEIGHT}.absmax": NAN}, "absmax': expected finite numbers, found NaN"),
    "negative scales": ({f"{WEIGHT}.absmax": NEGATIVE}, r"absmax': expected scales of at least 0, found -1"),
    "a shape of fewer elements": ({STATE: said(shape=[16, 64])}, r"expected shape \[16, 128\].*found \[16, 64\]"),
    "a shape turned round": ({STATE: said(shape=[128, 16])}, r"expected shape \[16, 128\].*found \[128, 16\]"),
    "no shape": ({STATE: said(shape=None)}, r"expected shape \[16, 128\].*found None"),
    "blocks of 0": ({STATE: said(blocksize=0)}, "expected blocksize of at least 1, found 0"),
    "blocks of true": ({STATE: said(blocksize=True)}, "expected blocksize of at least 1, found True"),
    "blocks of '64'": ({STATE: said(blocksize="64")}, "expected blocksize of at least 1, found '64'"),
    "no blocks": ({STATE: said(blocksize=None)}, "expected blocksize of at least 1, found None"),
    "blocks beyond reason": ({STATE: said(blocksize=2**70)}, "expected 1 scales of blocks of .*, found 32"),
    "another type inside": ({STATE: said(quant_type="fp4")}, "expected quant_type nf4, found 'fp4'"),
    "no UTF-8": ({STATE: raw(b'{"quant_type": "\xff"}')}, "expected a JSON object in UTF-8"),
    "no JSON": ({STATE: raw(b"nf4")}, "expected a JSON object in UTF-8"),
    "no object": ({STATE: raw(b"[64]")}, "expected a JSON object, found a list"),
    "JSON beyond measure": ({STATE: raw(b"[" * 60_000)}, "expected a JSON object in UTF-8"),
    "a quant_state beyond measure": (
        {STATE: torch.zeros(2**16 + 1, dtype=torch.uint8)},
        "expected JSON of at most 65536 bytes, found 65537 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_PLAIN)
def test_bad_four_bit_weights(name: str) -> None:
    refused(PLAIN, *OF_PLAIN[name])


OF_NESTED: dict[str, tuple[Change, str]] = {
    "too few shared scales": ({f"{WEIGHT}.nested_absmax": torch.ones(3)}, "expected 4 scales, each of 8 of the 32 blocks"),
    "no shared scales": ({f"{WEIGHT}.nested_absmax": None}, r"nested_absmax' of shape .*is missing"),
    "no table": ({f"{WEIGHT}.nested_quant_map": None}, r"nested_quant_map' of shape \[256\], float32, is missing"),
    "a short table": ({f"{WEIGHT}.nested_quant_map": torch.ones(255)}, r"nested_quant_map' should have shape \[256\]"),
    "NaN in the table": ({f"{WEIGHT}.nested_quant_map": torch.full((256,), torch.nan)}, "nested_quant_map': expected finite"),
    "infinite shared scales": ({f"{WEIGHT}.nested_absmax": torch.full((4,), torch.inf)}, "nested_absmax': expected finite"),
    "scales as float32": ({f"{WEIGHT}.absmax": torch.ones(32)}, r"absmax' should have shape \[32\], uint8.*float32"),
    "NaN as offset": ({STATE: said(NESTED, nested_offset=float("nan"))}, "expected a finite nested_offset, found nan"),
    "an offset beyond float32": ({STATE: said(NESTED, nested_offset=10**400)}, "expected a finite nested_offset"),
    "no offset": ({STATE: said(NESTED, nested_offset=None)}, "expected a finite nested_offset, found None"),
    "shared by none": ({STATE: said(NESTED, nested_blocksize=0)}, "expected nested_blocksize of at least 1, found 0"),
    "shared by too many": ({STATE: said(NESTED, nested_blocksize=2**70)}, "expected 1 scales"),
    "a quant_state of plain scales": ({STATE: said(NESTED, nested_blocksize=None)}, "expected nested_blocksize and"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_NESTED)
def test_bad_double_quantization(name: str) -> None:
    refused(NESTED, *OF_NESTED[name])


OF_INT8: dict[str, tuple[Change, str]] = {
    **{
        f"layout {number}": (
            {f"{MODULE}.weight_format": torch.tensor(number, dtype=torch.uint8)},
            rf"weight_format' should be 0 \(row\), found {number}.*col32, turing",
        )
        for number in (1, 2, 3)
    },
    "no scales": ({f"{MODULE}.SCB": None}, r"SCB': expected the scales of an int8 weight, found no such tensor"),
    "too few scales": ({f"{MODULE}.SCB": torch.ones(15)}, r"SCB' should have shape \[16\].*found \[15\]"),
    "NaN scales": ({f"{MODULE}.SCB": NAN[:16]}, "SCB': expected finite numbers"),
    "negative scales": ({f"{MODULE}.SCB": NEGATIVE[:16]}, "SCB': expected scales of at least 0"),
    "weights of 16 bits": ({WEIGHT: torch.zeros(16, 128).half()}, r"\[16, 128\], int8.*found \[16, 128\], float16"),
    "no weight": ({WEIGHT: None}, r"q_proj\.weight' of shape \[16, 128\], int8, is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_INT8)
def test_bad_int8_weights(name: str) -> None:
    refused(INT8, *OF_INT8[name])


@pytest.mark.parametrize(
    ("stated", "tensors"),
    [("nf4", INT8), ("fp4", PLAIN), ("int8", PLAIN)],
    ids=["int8 by nf4", "nf4 by fp4", "nf4 by int8"],
)
def test_a_config_of_another_checkpoint(stated: str, tensors: dict[str, torch.Tensor]) -> None:
    stored = sample({MODULE: (tensors, torch.zeros(16, 128).numpy())}, CONFIG)
    wide = {"load_in_4bit": False, "load_in_8bit": True}
    config = {**CONFIG, **(wide if stated == "int8" else {"bnb_4bit_quant_type": stated})}
    scheme = BitsAndBytes.from_checkpoint(config, stored.view())
    with pytest.raises(CheckpointError, match=rf"{MODULE}.*expected {stated} by quantization_config"):
        read_form(scheme, SPEC, stored.view())


@pytest.mark.parametrize(
    "break_it", [lambda t: t.update({f"{WEIGHT}.absmax": torch.ones(31)}), lambda t: t.pop(STATE)]
)
def test_messages_name_the_file(break_it: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> None:
    tensors = {f"{MODULE}.{suffix}": tensor for suffix, tensor in PLAIN.items()}
    break_it(tensors)
    write_folder(tmp_path, {}, tensors)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(open_checkpoint(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["quant_type", "blocksize", "shape", "nested_blocksize", "nested_offset"]), JSON
    ).map(lambda changes: bytes(said(NESTED, **changes).tolist()))
)
def test_whatever_a_quant_state_says_it_is_read_or_refused(text: bytes) -> None:
    stored = sample({MODULE: (dict(NESTED), torch.zeros(16, 128).numpy())}, CONFIG)
    view = stored.view(**{STATE: raw(text)})
    scheme = BitsAndBytes.from_checkpoint(CONFIG, view)
    try:
        form = read_form(scheme, SPEC, view)
    except CheckpointError:
        return
    assert form is not None
    assert bool(form.dequantize().isfinite().all())
