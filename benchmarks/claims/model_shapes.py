"""Write folders that hold a published model's config.json and nothing else: enough for `kvpage plan`.

    python benchmarks/claims/model_shapes.py [--out build/shapes] [--json]

The numbers are those of the models' public config files. The -awq folder adds what an AutoAWQ checkpoint states.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report import arguments

LLAMA_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "torch_dtype": "float16", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_1_70B: dict[str, Any] = {
    **LLAMA_2, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**LLAMA_2, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "intermediate_size": 11008},
    "llama-2-13b": {**LLAMA_2, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                    "num_key_value_heads": 40, "intermediate_size": 13824},
    "llama-2-70b": {**LLAMA_2, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "intermediate_size": 28672},
    "llama-3.1-70b": LLAMA_3_1_70B,
    "llama-3.1-70b-awq": {
        **LLAMA_3_1_70B, "torch_dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
                                "version": "gemm", "modules_to_not_convert": None},
    },
}  # fmt: skip


def write_shapes(folder: Path) -> list[Path]:
    """One folder with a ``config.json`` a shape; returns them."""
    written = []
    for name, config in SHAPES.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written.append(target)
    return written


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    options = parser.parse_args()
    folders = [str(folder) for folder in write_shapes(options.out)]
    print(json.dumps(folders) if options.json else "\n".join(folders))


if __name__ == "__main__":
    main()
