"""What gptq and awq hand over becomes a checkpoint: the source's tensors by the source's names, some replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpage import CheckpointError, KvpageError
from kvpage_quantize.gptq import stored_quantizer
from kvpage_quantize.output import write_config
from kvpage_quantize.packed import Packed, packed_pieces
from kvpage_quantize.safetensors_files import write_safetensors
from kvpage_quantize.source import open_source
from tiny_checkpoint import write_checkpoint

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", seed=5)


def written(plain: Path, packed: Packed, tmp_path: Path) -> dict[str, torch.Tensor]:
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", packed_pieces(open_source(str(plain)), packed))
    return load_file(tmp_path / "out" / "model.safetensors")


def test_a_module_s_tensors_stand_in_place_of_its_weight_and_plain_ones_become_float16(
    plain: Path, tmp_path: Path
) -> None:
    codes = torch.arange(32, dtype=torch.int32).reshape(4, 8)
    norm = torch.full((32,), 0.25)
    packed = Packed(config={}, modules={QUERY: {"qweight": codes}}, changed={"model.norm.weight": norm})
    before, after = load_file(plain / "model.safetensors"), written(plain, packed, tmp_path)
    assert after.keys() == (before.keys() - {f"{QUERY}.weight"}) | {f"{QUERY}.qweight"}
    assert after[f"{QUERY}.qweight"].equal(codes)
    assert after["model.norm.weight"].equal(norm.half())
    for name in before.keys() - {f"{QUERY}.weight", "model.norm.weight"}:
        assert after[name].equal(before[name].half()), name


def test_a_plain_value_beyond_float16_is_named(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(KvpageError, match=r"'lm_head\.weight' holds values beyond what float16 can"):
        written(plain, Packed(config={}), tmp_path)


def test_a_module_that_the_files_name_otherwise_is_refused(plain: Path, tmp_path: Path) -> None:
    packed = Packed(config={}, modules={"language_model.layers.0.q": {}})
    with pytest.raises(CheckpointError, match=r"no tensor 'language_model\.layers\.0\.q\.weight'"):
        written(plain, packed, tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_what_stays_plain_is_stated_where_it_was(key: str, tmp_path: Path) -> None:
    config = {
        key: "bfloat16",
        "text_config": {key: "bfloat16", "hidden_size": 8},
        "quantization_config": None,
    }
    write_config(tmp_path, config, {"quant_method": "gptq"}, "float16")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        key: "float16",
        "text_config": {key: "float16", "hidden_size": 8},
        "quantization_config": {"quant_method": "gptq"},
    }


class FourBits:
    """auto-gptq's Quantizer as far as it is asymmetric: a zero point that rounds to 0 where no weight is negative."""

    def find_params(self, x: torch.Tensor, weight: bool = False) -> None:
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        self.maxq = torch.tensor(15)
        self.scale = ((high - low) / 15).unsqueeze(1)
        self.zero = (-low.unsqueeze(1) / self.scale).round()


def test_scales_and_zero_points_are_those_that_the_file_can_hold() -> None:
    quantizer = stored_quantizer(FourBits)()
    rows = torch.tensor([[0.7, 0.11, 0.33], [-0.5, 0.2, 1.0]])
    quantizer.find_params(rows, weight=True)
    assert quantizer.zero.tolist() == [[1.0], [5.0]], "0 cannot be written"
    assert quantizer.scale.equal(quantizer.scale.half().float())
    codes = (rows / quantizer.scale).round() + quantizer.zero
    assert bool(((codes >= 0) & (codes <= 15)).all())
    assert bool(
        (((codes - quantizer.zero) * quantizer.scale - rows).abs() <= quantizer.scale / 2 + 1e-3).all()
    )
