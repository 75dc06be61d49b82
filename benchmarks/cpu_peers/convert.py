"""Make a peer's form of a checkpoint ``<model>-bf16``, in that peer's own environment.

    LLAMACPP/bin/python -m cpu_peers.convert --models MODELS --model S --to gguf       # llama_cpp, gguf, torch, safetensors
    OPENVINO/bin/python -m cpu_peers.convert --models MODELS --model S --to openvino   # optimum[openvino], nncf
    python -m cpu_peers.convert --models MODELS --model S --to vllm                    # torch, safetensors

Run in the folder ``benchmarks``. Llama-like checkpoints only. gguf: bf16, q8_0 and q4_0. openvino: fp16, int8, and int4
in groups of 128. vllm: int8 (per-channel weights, per-token activations) and int4 (groups of 128, symmetric) as
compressed-tensors, rounded to the nearest; embedding and output head stay as they are, since vLLM quantizes neither.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

GROUP = 128
GGUF_FILE_TYPES = {"q8_0": 7, "q4_0": 2}
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
}  # fmt: skip


def read_weights(folder: Path) -> dict[str, Any]:
    """Tensors by name."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def to_gguf(source: Path, stem: str) -> None:
    """A file of bfloat16 weights without a tokenizer, and what llama.cpp quantizes it to."""
    import llama_cpp

    plain = Path(f"{stem}-bf16.gguf")
    write_gguf(source, plain)
    for kind, number in GGUF_FILE_TYPES.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, 2
        target = f"{stem}-{kind}.gguf"
        if llama_cpp.llama_model_quantize(str(plain).encode(), target.encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp cannot write {target}")


def write_gguf(source: Path, target: Path) -> None:
    """``source`` as llama.cpp reads it: heads of Q and K interleaved, norms in float32."""
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(source.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for name, tensor in read_weights(source).items():
        short = gguf_name(name.removeprefix("model."))
        if "attn_q" in short or "attn_k" in short:
            tensor = interleave(tensor, heads if "attn_q" in short else kv_heads)
        if tensor.ndim == 1:
            writer.add_tensor(short, tensor.float().numpy())
        else:
            octets = tensor.contiguous().view(torch_uint8()).numpy()
            writer.add_tensor(short, octets, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    return "output.weight" if name == "lm_head.weight" else GGUF_NAMES[name]


def interleave(weight: Any, heads: int) -> Any:
    """Rows of [heads, 2, D / 2] as [heads, D / 2, 2]: pairs that rope turns lie side by side."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def torch_uint8() -> Any:
    """torch's type of a byte."""
    import torch

    return torch.uint8


def to_openvino(source: Path, stem: str) -> None:
    """OpenVINO's own export, in 16, 8 and 4 bits."""
    command = Path(sys.executable).with_name("optimum-cli")
    for kind in ("fp16", "int8", "int4"):
        extra = ["--group-size", str(GROUP), "--ratio", "1.0"] if kind == "int4" else []
        task = ["--task", "text-generation-with-past", "--weight-format", kind, *extra]
        subprocess.run([command, "export", "openvino", "-m", source, *task, f"{stem}-ov-{kind}"], check=True)


def to_vllm(source: Path, stem: str) -> None:
    """compressed-tensors checkpoints of 8 and of 4 bits."""
    from safetensors.torch import save_file

    weights = read_weights(source)
    for bits, quantized in ((8, channels_of_8_bits), (4, groups_of_4_bits)):
        target = Path(f"{stem}-vllm-int{bits}")
        target.mkdir(exist_ok=True)
        tensors: dict[str, Any] = {}
        for name, tensor in weights.items():
            if name.endswith("_proj.weight"):
                layer = name.removesuffix("weight")
                tensors |= {layer + part: value for part, value in quantized(tensor.float()).items()}
            else:
                tensors[name] = tensor
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, target / "model.safetensors", {"format": "pt"})
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, target)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = vllm_config(bits)
        (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def channels_of_8_bits(weight: Any) -> dict[str, Any]:
    """[N, K] float32 -> int8 and a scale for each output."""
    import torch

    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale.to(torch.bfloat16)}


def groups_of_4_bits(weight: Any) -> dict[str, Any]:
    """[N, K] float32 -> 8 codes in an int32, lowest first, and a scale for each group of inputs."""
    import torch

    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    codes = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int32).view(weight.shape[0], -1, 8)
    packed = torch.zeros(codes.shape[:2], dtype=torch.int32)
    for place in range(8):
        packed |= codes[:, :, place] << (4 * place)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2).to(torch.bfloat16),
        "weight_shape": shape,
    }


def vllm_config(bits: int) -> dict[str, Any]:
    """compressed-tensors' description of those weights."""
    common = {"num_bits": bits, "type": "int", "symmetric": True}
    grouped: dict[str, Any] = {"strategy": "group", "group_size": GROUP}
    weights = {
        **common,
        **({"strategy": "channel", "group_size": None} if bits == 8 else grouped),
        "dynamic": False,
    }
    tokens = {**common, "strategy": "token", "dynamic": True} if bits == 8 else None
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": tokens,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", default="S")
    parser.add_argument("--to", choices=["gguf", "openvino", "vllm"], required=True)
    given = parser.parse_args()
    convert = {"gguf": to_gguf, "openvino": to_openvino, "vllm": to_vllm}[given.to]
    convert(given.models / f"{given.model}-bf16", str(given.models / given.model))


if __name__ == "__main__":
    main()
