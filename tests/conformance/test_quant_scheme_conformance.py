"""A format of the tests' own passes the suite of quantization schemes, and samples may be folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from grouped_int4 import GroupedInt4, grouped_sample
from safetensors.torch import save_file

from kvpage.testing.checkpoints import QuantSample, read_folder
from kvpage.testing.quantization import QuantSchemeConformance


class TestGroupedInt4(QuantSchemeConformance):
    """Packed, grouped, with a zero point: what a format of group scales needs of the contract."""

    scheme = GroupedInt4

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield "groups-of-8", grouped_sample(8)
        yield "groups-of-16", grouped_sample(16)


def test_a_folder_of_safetensors_is_a_sample(tmp_path: Path) -> None:
    sample = grouped_sample(8)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "grouped", "bits": 4}}')
    half = {"half": torch.arange(6.0).bfloat16().view(2, 3), "nothing": torch.empty(0, 4)}
    save_file({**sample.tensors, **half}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config, tensors = read_folder(tmp_path)
    assert config == {"quant_method": "grouped", "bits": 4}
    for name, tensor in {**sample.tensors, **half}.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_a_format_without_samples_says_what_is_missing() -> None:
    class Without(QuantSchemeConformance):
        scheme = GroupedInt4

    with pytest.raises(NotImplementedError, match=r"samples\(\)"):
        Without().axes()
