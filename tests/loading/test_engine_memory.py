"""The engine's own memory: lazily taken, given back, and at most a slice more than the weights at load."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvpage.api.parameters import parameters
from kvpage.loading.memory import CHUNK_BYTES, Arena
from kvpage.models.families import llama
from kvpage.models.hf_config import HFConfig

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def status(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (1024, 1025), (0, 4), ()])
def test_tensors_are_zeroed_aligned_and_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arena = Arena()
    tensors = [arena.allocate(shape, dtype) for _ in range(3)]
    for value, tensor in enumerate(tensors, 1):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(value)
    for value, tensor in enumerate(tensors, 1):
        assert (tensor == value).all()


def test_it_counts_what_it_gave() -> None:
    arena = Arena()
    arena.allocate((10, 10), torch.float32)
    arena.allocate((2 * MIB,), torch.int8)
    assert arena.allocated_bytes == 400 + 2 * MIB


def test_many_small_tensors_fill_chunk_after_chunk() -> None:
    arena = Arena()
    tensors = [arena.allocate((CHUNK_BYTES // 3,), torch.int8) for _ in range(8)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [int(tensor.unique()) for tensor in tensors] == list(range(8))


@linux
def test_untouched_memory_is_address_space_only() -> None:
    gc.collect()
    before = status("VmRSS")
    tensor = Arena().allocate((512 * MIB,), torch.int8)
    assert status("VmRSS") - before < 8 * MIB
    tensor[: 64 * MIB].fill_(1)
    assert status("VmRSS") - before > 60 * MIB


@linux
def test_memory_goes_back_when_the_last_view_dies() -> None:
    gc.collect()  # what earlier tests left must not go away in between
    arena = Arena()
    size, resident = status("VmSize"), status("VmRSS")
    tensor = arena.allocate((64, MIB), torch.int8).fill_(1)
    view = tensor[3:5].view(-1)
    del tensor
    gc.collect()
    assert status("VmSize") - size > 60 * MIB
    assert view.min() == 1
    del view
    gc.collect()
    assert status("VmSize") - size < 8 * MIB
    assert status("VmRSS") - resident < 8 * MIB


@linux
def test_close_gives_the_pages_back_at_once_and_leaves_views_valid() -> None:
    arena = Arena()
    resident = status("VmRSS")
    tensor = arena.allocate((64 * MIB,), torch.int8).fill_(1)
    arena.close()
    arena.close()
    assert status("VmRSS") - resident < 8 * MIB
    assert not tensor.any()
    with pytest.raises(ValueError, match="closed"):
        arena.allocate((1,), torch.int8)


CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
LOADING = """
import json, sys, torch
from pathlib import Path
from kvpage_int8.schemes import Int8
from kvpage.loading.memory import Arena
from kvpage.loading.readers import open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.families import llama
from kvpage.models.hf_config import HFConfig

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))

definition = llama.translate(HFConfig(json.loads(sys.argv[1])), max_model_len=None)
for dtype, scheme in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, Int8())):
    # What torch itself allocates at the first conversion is not the loader's.
    torch.ones(64, 64).to(dtype)
    if scheme is not None:
        scheme.to_form(None, {"weight": torch.ones(600, 512)})
    arena, before = Arena(), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loaded = load_weights(definition, open_checkpoint(Path(sys.argv[2])), dtype=dtype, device="cpu", arena=arena,
                          scheme=scheme)
    print(arena.allocated_bytes, status("VmHWM") - before)
    del loaded
    arena.close()
"""


@linux
def test_peak_memory_of_a_load_is_the_weights_and_a_tenth(tmp_path: Path) -> None:
    definition = llama.translate(HFConfig(CONFIG), max_model_len=None)
    tensors = {definition.weights[p.name].name: torch.zeros(p.shape) for p in parameters(definition.spec)}
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, json.dumps(CONFIG), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    plain, narrow, int8 = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    for weights, peak in (plain, narrow):
        assert weights > 50 * MIB
        assert peak < 1.1 * weights + 2 * MIB, f"{peak} bytes at peak for {weights} bytes of weights"
    # Quantizing needs a matrix as the checkpoint has it, its codes, and slices (of the file, of float32 values).
    (weights, peak), matrix = int8, 5 * 512 * 1536
    assert weights < 0.75 * narrow[0]
    assert peak < weights + matrix + 16 * MIB, f"{peak} bytes at peak for {weights} bytes of int8 weights"
