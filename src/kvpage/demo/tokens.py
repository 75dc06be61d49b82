"""The tokenizer of the demo model: byte-level BPE with single digits, and its chat template."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvpage.demo.corpus import BOS, END, PAD, ROLES, documents

__all__ = ["CHAT_TEMPLATE", "CONTEXT", "VOCABULARY", "train_tokenizer", "write_tokenizer"]

VOCABULARY = 2048
CONTEXT = 4096

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('The demo model knows the roles system, user and assistant, not ' ~ role ~ '.') }}
{%- endif %}
{{- '<|' ~ role ~ '|>' }}
{%- if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] or [] %}
{{- part['text'] | trim }}
{%- endfor %}
{%- endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""


def train_tokenizer(seed: int) -> Tokenizer:
    """Train the tokenizer on a sample of the training text. Plain text gets one BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, *ROLES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = islice(documents(seed), 20_000)
    texts = (segment.text for document in sample for segment in document)
    pieces = (text.replace(END, "").replace(BOS, "") for text in texts)
    tokenizer.train_from_iterator((_without_roles(piece) for piece in pieces), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _without_roles(text: str) -> str:
    for marker in ROLES.values():
        text = text.replace(marker, "")
    return text


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template)."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
