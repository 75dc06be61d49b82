"""A checkpoint for the commands: a byte-level tokenizer with a chat template, weights made up by the loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000,
    "max_position_embeddings": 4096, "torch_dtype": "float16", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 2 layers without weight files: to be run with ``--load-format dummy``."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **LLAMA_2_70B, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 256,
        "torch_dtype": "float32", "eos_token_id": tokenizer.token_to_id("</s>"),
    }  # fmt: skip
    write(folder / "config.json", config)
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "chat_template": TEMPLATE},
    )  # fmt: skip
    return str(folder)


@pytest.fixture
def llama_2_70b(tmp_path: Path) -> str:
    """A folder with nothing but the config of Llama-2-70B."""
    write(tmp_path / "config.json", LLAMA_2_70B)
    return str(tmp_path)


def write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
