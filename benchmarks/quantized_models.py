"""Writes a plain Llama checkpoint again in the formats that people download, rounded to nearest: for measuring speed.

    python benchmarks/quantized_models.py MODELS/S-bf16 --out QUANTIZED --formats gptq-g128,awq-g128,nf4

The files have the layouts that auto-gptq, AutoAWQ, bitsandbytes, compressed-tensors and llama.cpp write; their rounding
is the simplest there is, so they say nothing of quality. `kvpage quantize` writes checkpoints for use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
GGUF_TYPES = {"q4_0": 2, "q4_k": 12, "q8_0": 8, "f32": 0, "bf16": 30}
ALIGNMENT = 32


def affine(
    weight: torch.Tensor, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes 0..15 uint8 [N, K], scales float16 [N, G], zeros uint8 [N, G]) to the nearest."""
    rows = weight.float().view(weight.shape[0], -1, group)
    if symmetric:
        scales = rows.abs().amax(2).div_(7).half()
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:
        low, high = rows.amin(2).clamp_(max=0), rows.amax(2).clamp_(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round_().clamp_(1, 15).to(torch.uint8)
    codes = (rows / scales.float().unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, 15)
    return codes.view(weight.shape).to(torch.uint8), scales, zeros


def words(values: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit values along the last dimension to an int32, the first in the lowest bits."""
    pairs = values[..., 0::2] | values[..., 1::2] << 4
    return pairs.reshape(-1).view(torch.int32).view(*values.shape[:-1], -1)


def gptq(group: int, *, symmetric: bool, act_order: bool) -> Callable[[str, torch.Tensor], Tensors]:
    """qweight, qzeros (less one), scales, g_idx as auto-gptq writes them."""

    def pack(name: str, weight: torch.Tensor) -> Tensors:
        inputs = weight.shape[1]
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) if act_order else None
        codes, scales, zeros = affine(weight if order is None else weight[:, order], group, symmetric)
        groups = torch.arange(inputs, dtype=torch.int32) // group
        if order is not None:
            place = order.argsort()
            codes, groups = codes[:, place], groups[place]
        return {
            f"{name}.qweight": words(codes).t().contiguous(),
            f"{name}.qzeros": words((zeros - 1).t().contiguous()),
            f"{name}.scales": scales.t().contiguous(),
            f"{name}.g_idx": groups,
        }

    return pack


def awq(group: int) -> Callable[[str, torch.Tensor], Tensors]:
    """AutoAWQ's GEMM layout: nibble i of a word is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        eights = values.t().reshape(values.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(values.shape[1], -1))

    def pack(name: str, weight: torch.Tensor) -> Tensors:
        codes, scales, zeros = affine(weight, group, symmetric=False)
        return {
            f"{name}.qweight": interleaved(codes),
            f"{name}.qzeros": interleaved(zeros),
            f"{name}.scales": scales.t().contiguous(),
        }

    return pack


def compressed(group: int) -> Callable[[str, torch.Tensor], Tensors]:
    """compressed-tensors' pack-quantized, symmetric."""

    def pack(name: str, weight: torch.Tensor) -> Tensors:
        codes, scales, _ = affine(weight, group, symmetric=True)
        return {
            f"{name}.weight_packed": words(codes),
            f"{name}.weight_scale": scales.bfloat16(),
            f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    return pack


def float8(name: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors' float-quantized, a scale an output."""
    scales = weight.float().abs().amax(1, keepdim=True).div_(448).bfloat16()
    codes = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}


NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])  # fmt: skip


def nf4(name: str, weight: torch.Tensor) -> Tensors:
    """bitsandbytes, blocks of 64, without double quantization."""
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(1)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = torch.bucketize(blocks / largest.unsqueeze(1), middles).to(torch.uint8).view(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        f"{name}.weight": (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
        f"{name}.weight.absmax": largest,
        f"{name}.weight.quant_map": NF4.clone(),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def _group_config(kind: str, weights: dict[str, object]) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip


def _gptq_config(group: int, symmetric: bool, act_order: bool) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": act_order,
            "damp_percent": 0.01, "true_sequential": True, "static_groups": False}  # fmt: skip


def _int4(group: int) -> dict[str, object]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}


SAFETENSORS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, object]]] = {
    "gptq-g128": (gptq(128, symmetric=True, act_order=False), _gptq_config(128, True, False)),
    "gptq-g32-act-order": (gptq(32, symmetric=False, act_order=True), _gptq_config(32, False, True)),
    "awq-g128": (awq(128), {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
                            "version": "gemm", "modules_to_not_convert": None}),
    "w4a16-g32": (compressed(32), _group_config("pack-quantized", _int4(32))),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8"}),
    "fp8": (float8, _group_config("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True,
                                                      "strategy": "channel"})),
}  # fmt: skip


def write_safetensors(source: Path, folder: Path, name: str) -> None:
    """``source`` in the format ``name``: its layers' matrices packed, all else as it is."""
    pack, stated = SAFETENSORS[name]
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for key, tensor in plain_tensors(source):
        router = key.endswith(".gate.weight")
        packed = tensor.dim() == 2 and key.startswith("model.layers.") and not router
        tensors.update(pack(key.removesuffix(".weight"), tensor) if packed else {key: tensor})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}, indent=1))
    for file in source.glob("*token*"):
        shutil.copy(file, folder)


def plain_tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder of safetensors."""
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # it is no mapping
                yield key, opened.get_tensor(key)


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: a float16 scale, then elements 0-15 in the low halves of 16 bytes and 16-31 in the high ones."""
    blocks = weight.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1) / 7).half()
    codes = (blocks / scale.float().unsqueeze(1)).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return torch.cat((scale.unsqueeze(1).view(torch.uint8), codes[:, :16] | codes[:, 16:] << 4), 1)


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: a float16 scale, 32 int8."""
    blocks = weight.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1) / 127).half()
    codes = (blocks / scale.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.unsqueeze(1).view(torch.uint8), codes.view(torch.uint8)), 1)


def q4_k(weight: torch.Tensor) -> torch.Tensor:
    """Super-blocks of 256: float16 scale of scales and of minima, 8 of each in 6 bits, 128 bytes of codes."""
    blocks = weight.float().reshape(-1, 8, 32)
    low = blocks.amin(2).clamp_(max=0).neg_()
    step = (blocks.amax(2) + low) / 15
    d, dmin = ((part.amax(1) / 63).half() for part in (step, low))
    scales, minima = (
        (part / shared.float().unsqueeze(1)).round_().clamp_(0, 63).to(torch.uint8)
        for part, shared in ((step, d), (low, dmin))
    )
    true_step = (d.float().unsqueeze(1) * scales).unsqueeze(2)
    true_low = (dmin.float().unsqueeze(1) * minima).unsqueeze(2)
    codes = ((blocks + true_low) / true_step).round_().clamp_(0, 15).to(torch.uint8)
    packed = torch.cat(
        (scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6,
         scales[:, 4:] & 15 | minima[:, 4:] << 4), 1
    )  # fmt: skip
    pairs = codes.view(-1, 4, 2, 32)
    both = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    halves = torch.stack((d, dmin), 1).view(torch.uint8)
    return torch.cat((halves, packed, both), 1)


GGUF = {"q4_0": q4_0, "q4_k": q4_k, "q8_0": q8_0}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}  # fmt: skip


def write_gguf(source: Path, file: Path, kind: str) -> None:
    """``source`` as one GGUF v3 file, all matrices of one type."""
    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    infos, blobs, offset = [], [], 0
    for key, tensor in plain_tensors(source):
        name = key
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        count = next((heads[part] for part in heads if f".{part}." in key), 0)
        if count:
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        stored = kind if tensor.dim() == 2 else "f32"
        data = GGUF[kind](tensor) if tensor.dim() == 2 else tensor.float()
        raw = data.contiguous().view(torch.uint8).numpy().tobytes()
        infos.append(_info(name, tensor.shape, GGUF_TYPES[stored], offset))
        blobs.append(raw + b"\0" * (-len(raw) % ALIGNMENT))
        offset += len(blobs[-1])
    keys = _metadata(config)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(head + b"\0" * (-len(head) % ALIGNMENT))
        out.writelines(blobs)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _info(name: str, shape: torch.Size, kind: int, offset: int) -> bytes:
    dims = list(shape)[::-1]
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _metadata(config: dict[str, object]) -> list[bytes]:
    """Key, type (4 uint32, 6 float32, 8 string), value."""
    whole = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "vocab_size": "vocab_size",
    }  # fmt: skip
    keys = [_text("general.architecture") + struct.pack("<I", 8) + _text("llama")]
    keys += [_text(f"llama.{ours}") + struct.pack("<II", 4, config[theirs]) for ours, theirs in whole.items()]
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 10000.0)  # type: ignore[attr-defined]
    floats = {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": theta}
    return keys + [_text(f"llama.{key}") + struct.pack("<If", 6, value) for key, value in floats.items()]


FORMATS = (*SAFETENSORS, *GGUF)


def make(source: Path, out: Path, name: str) -> Path:
    """The path of ``source`` in the format ``name`` below ``out``; written unless it is there."""
    path = out / (f"{source.name}-{name}.gguf" if name in GGUF else f"{source.name}-{name}")
    if not path.exists():
        write_gguf(source, path, name) if name in GGUF else write_safetensors(source, path, name)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder in Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS), help="of %(default)s")
    given = parser.parse_args()
    for name in given.formats.split(","):
        print(make(given.source, given.out, name))


if __name__ == "__main__":
    main()
