"""Write a random checkpoint of a stated shape, for benchmarks: no download, same weights for every engine.

python benchmarks/make_model.py --out /tmp/S            # 100M parameters
python benchmarks/make_model.py --out /tmp/M --shape M  # 1.03B parameters
"""

from __future__ import annotations

import argparse

SHAPES = {
    "S": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
          "intermediate_size": 2048, "tie_word_embeddings": True},
    "M": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
          "intermediate_size": 5632, "tie_word_embeddings": False},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--shape", choices=[*SHAPES], default="S")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        **SHAPES[options.shape],
    )
    LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(options.out)


if __name__ == "__main__":
    main()
