"""Reading safetensors: what the header says is checked against the file before it is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvpage.errors import CheckpointError
from kvpage.loading.readers import open_checkpoint
from kvpage.loading.safetensors import SafetensorsFile

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, *, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_read_as_they_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {
        "matrix": torch.arange(12).view(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(saved, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert set(file.infos()) == set(saved)
    for name, tensor in saved.items():
        assert torch.equal(file.read(name), tensor)
        assert file.infos()[name].dtype == str(dtype).removeprefix("torch.")


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path: Path) -> None:
    header = {"a": entry(1, 9)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    values = torch.tensor([1.5, -2.5])
    file = SafetensorsFile(write(tmp_path / "f.safetensors", raw, b"x" + values.numpy().tobytes()))
    assert torch.equal(file.read("a"), values)


def test_slices_come_in_order_and_cover_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpage.loading.readers.SLICE_BYTES", 100)
    whole = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    save_file({"a": whole}, tmp_path / "model.safetensors")
    pieces = [piece.clone() for piece in open_checkpoint(tmp_path).slices("a", 3, 41)]
    assert len(pieces) == 19
    assert torch.equal(torch.cat(pieces), whole[3:41])


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 10**12, "truncated or no safetensors file: its header should have 1000000000000 bytes"),
        (b"{}", b"", 3, "its header should have 3 bytes, the file has 10"),
        (b"{nope}", b"", None, "the header is not valid JSON"),
        (b"[]", b"", None, "must be a JSON object, found a list"),
        (b"[" * 100_000, b"", None, "the header is not valid JSON"),
        ({"a": 3}, b"", None, "tensor 'a' needs dtype, shape and data_offsets"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
            b"",
            None,
            "needs dtype, shape and data_offsets",
        ),
        ({"a": entry(0, 8, dtype="F3")}, bytes(8), None, "tensor 'a' has dtype 'F3'; kvpage reads F64"),
        ({"a": entry(0, 8, dtype=[])}, bytes(8), None, "tensor 'a' has dtype"),
        ({"a": entry(0, 8, shape=(-2,))}, bytes(8), None, "shape or offsets that are no sizes"),
        ({"a": entry(0, 8, shape=("2",))}, bytes(8), None, "shape or offsets that are no sizes"),
        (
            {"a": entry(0, 8, shape=(10**9, 10**9))},
            bytes(8),
            None,
            "takes 4000000000000000000 bytes, the header gives it 8",
        ),
        ({"a": entry(8, 0)}, bytes(8), None, "takes 8 bytes, the header gives it -8"),
        ({"a": entry(0, 8)}, bytes(7), None, "is truncated: tensor 'a' ends at byte"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "tensors 'a' and 'b' overlap"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    path = write(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(tmp_path)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    view = open_checkpoint(tmp_path)
    assert set(view.names()) == {"a", "b"}
    assert torch.equal(view.read("b"), torch.zeros(3))
    assert view.where("b").endswith("model-2.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "model-1.safetensors", "c": "model-3.safetensors"},
            r"names the shard model-3\.safetensors, which is missing",
        ),
        ({"a": "../model-1.safetensors"}, "shards lie beside the index"),
        ({"z": "model-1.safetensors"}, r"model-1\.safetensors holds tensor 'z'; it does not"),
        (["a"], "is no index"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, weight_map: Any, message: str
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"has no weights; model\.safetensors"),
        (
            ["pytorch_model.bin"],
            r"has weights as pytorch_model\.bin only; kvpage reads safetensors\. Convert them once",
        ),
        (["a.safetensors", "b.safetensors"], "has 2 safetensors files .* download the index too"),
    ],
)
def test_a_folder_without_readable_weights_says_the_way_out(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
