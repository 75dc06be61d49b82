"""A minimal GGUF writer after the format's description, and transformers' models in llama.cpp's names and orders."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
CODES = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}

Blob = tuple[int, tuple[int, ...], bytes]
"""(ggml's type, shape with the outputs first, data)."""


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: Any) -> bytes:
    """Type and value: bool, uint32 (int32 below 0), float32, str, or a list of one of them."""
    if isinstance(value, bytes):  # as it stands
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        kind = type(value[0]) if value else str
        if kind is str:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        number, code = (5, "i") if kind is int else CODES[kind]
        return struct.pack(f"<IIQ{len(value)}{code}", 9, number, len(value), *value)
    number, code = (5, "i") if type(value) is int and value < 0 else CODES[type(value)]
    return struct.pack(f"<I{code}", number, value)


def gguf_bytes(
    keys: Mapping[str, Any] | list[tuple[str, Any]],
    tensors: Mapping[str, Blob] | list[tuple[str, Blob]],
    *,
    alignment: int = 32,
    version: int = 3,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """``offsets``: of some tensors, instead of their own."""
    pairs = list(keys.items()) if isinstance(keys, Mapping) else keys
    blobs = list(tensors.items()) if isinstance(tensors, Mapping) else tensors
    header = b"GGUF" + struct.pack("<IQQ", version, len(blobs), len(pairs))
    header += b"".join(text(key) + value_bytes(value) for key, value in pairs)
    data = b""
    for name, (kind, shape, content) in blobs:
        offset = (offsets or {}).get(name, len(data))
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        data += content + b"\0" * (-len(content) % alignment)
    return header + b"\0" * (-len(header) % alignment) + data


def encoded(weight: torch.Tensor, kind: int) -> tuple[Blob, torch.Tensor]:
    """``weight`` as stored, and the float32 values which that stands for."""
    values = weight.detach().float().numpy()
    shape = values.shape
    if kind == F32:
        return (kind, shape, values.astype("<f4").tobytes()), torch.from_numpy(values.copy())
    if kind == F16:
        half = values.astype("<f2")
        return (kind, shape, half.tobytes()), torch.from_numpy(half.astype(np.float32))
    if kind == BF16:
        cut = torch.from_numpy(values).bfloat16()
        return (kind, shape, cut.view(torch.int16).numpy().tobytes()), cut.float()
    groups = values.reshape(-1, 32)
    if kind == Q8_0:
        scale = (np.abs(groups).max(1) / 127).astype("<f2")
        codes = (
            np.rint(groups / np.maximum(scale.astype(np.float32), 1e-8)[:, None]).clip(-127, 127).astype("i1")
        )
        packed = np.concatenate([scale[:, None].view("u1"), codes.view("u1")], 1)
    else:
        assert kind == Q4_0
        scale = (np.abs(groups).max(1) / 7).astype("<f2")
        codes = np.rint(groups / np.maximum(scale.astype(np.float32), 1e-8)[:, None]).clip(-8, 7).astype("i1")
        raised = (codes + 8).astype("u1")
        packed = np.concatenate([scale[:, None].view("u1"), raised[:, :16] | raised[:, 16:] << 4], 1)
    exact = scale.astype(np.float32)[:, None] * codes.astype(np.float32)
    return (kind, shape, packed.tobytes()), torch.from_numpy(exact.reshape(shape))


LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
GEMMA = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensors(
    model: torch.nn.Module, architecture: str, kinds: Mapping[str, int]
) -> Iterator[tuple[str, Blob, str, torch.Tensor]]:
    """(GGUF's name, blob, transformers' name, what the blob stands for in transformers) of every parameter.

    ``kinds``: ggml's type of matrices by a part of GGUF's name; "" is the others'. Norms and biases are F32.
    """
    config: Any = model.config
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for stored, hf_name, value in _renamed(name, tensor, architecture):
            layer = stored.partition(".weight")[0]
            kind = (
                F32
                if value.dim() == 1 or layer.endswith(("_norm", "_inp", "_inp_shexp"))
                else next(kind for part, kind in kinds.items() if part in stored)
            )
            given = value
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            count = heads.get(stored.split(".")[2] if stored.startswith("blk.") else "", 0)
            if architecture == "llama" and count:  # halves of a head become neighbours
                given = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            shifted = architecture.startswith("gemma") and stored.endswith("norm.weight")
            blob, exact = encoded(given + 1 if shifted else given, kind)
            if architecture == "llama" and count:
                exact = exact.reshape(count, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            yield stored, blob, hf_name, exact - 1 if shifted else exact


def _renamed(name: str, tensor: torch.Tensor, architecture: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    module, _, part = name.rpartition(".")
    if not name.startswith("model.layers."):
        yield f"{TOP[module]}.{part}", name, tensor
        return
    _, _, index, local = name.split(".", 3)
    if "experts." in local and "shared" not in local:  # transformers 5 holds all experts in one
        if local.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            yield f"blk.{index}.ffn_gate_exps.weight", f"{name}:0", gate
            yield f"blk.{index}.ffn_up_exps.weight", f"{name}:1", up
        else:
            yield f"blk.{index}.ffn_down_exps.weight", name, tensor
        return
    table = GEMMA if architecture in ("gemma2", "gemma3") else LAYER
    local = local.rpartition(".")[0]
    if local == "mlp.shared_expert_gate":
        tensor = tensor.reshape(-1)
    yield f"blk.{index}.{table[local]}.{part}", name, tensor


def write_model(
    path: Path, model: torch.nn.Module, architecture: str, keys: Mapping[str, Any], kinds: Mapping[str, int],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """``model`` as a file; its own weights become what the file stands for."""
    blobs: list[tuple[str, Blob]] = []
    state = model.state_dict()
    for stored, blob, name, exact in list(gguf_tensors(model, architecture, kinds)):
        blobs.append((stored, blob))
        place, _, half = name.partition(":")
        target = state[place] if not half else state[place].chunk(2, 1)[int(half)]
        target.copy_(exact.reshape(target.shape))
    blobs += [(name, encoded(tensor, F32)[0]) for name, tensor in (extra or {}).items()]
    config: Any = model.config
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    stated = {
        f"{architecture}.{key}": value for key, value in {**own, **keys}.items() if not key.startswith("tok")
    }
    stated |= {key: value for key, value in keys.items() if key.startswith("tok")}
    path.write_bytes(gguf_bytes({"general.architecture": architecture, **stated}, blobs))
