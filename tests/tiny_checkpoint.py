"""A random Llama with a trained byte-level tokenizer and a chat template, as a folder; made in a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = [
    "The block pool hands out blocks, and the prefix index finds them again.",
    "Paged attention reads keys and values through the block table of a sequence.",
    "Every request ends in exactly one terminal event, whatever happens on the way.",
    "Grüße aus Köln, naïve café; 你好世界。 emoji 😀 and 12345 + 67890 = 80235.",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def write_checkpoint(folder: Path, *, seed: int = 0, tokenizer: bool = True, **config: Any) -> Path:
    """A checkpoint in ``folder``; ``config`` changes entries of config.json, sizes included."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = trained_tokenizer()
    settings = {**CONFIG, "vocab_size": backend.get_vocab_size(), **config}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(random_weights(settings, seed), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        backend.save(str(folder / "tokenizer.json"))
        names = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": CHAT_TEMPLATE,
        }
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**names, **kind}), encoding="utf-8")
    return folder


def trained_tokenizer() -> Tokenizer:
    """About 380 tokens, the special ones first; a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights under Hugging Face's names, large enough for the next token to depend on all before it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.25

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    tensors = {
        "model.embed_tokens.weight": draw(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": draw(vocabulary, hidden),
    }
    shapes = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden)
    return tensors
