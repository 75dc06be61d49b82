"""A model that writes what a test tells it to: real tokens of the tiny model, chosen by a logits processor."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from served_model import ServedModel

from kvpage import PluginRegistry, SamplingParams, hookimpl
from kvpage.api.records import LogitsProcessorRecord
from kvpage.api.sampling import LogitsProcessor
from tiny_checkpoint import EOS

TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools: {% for t in tools %}{{ t | tojson }};{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows tools, calls and their results."""


class Script(LogitsProcessor):
    """Row by row the next token of ``extra_args["script"]``."""

    def __init__(self) -> None:
        self._left: dict[int, list[int]] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._left[slot] = list(params.extra_args["script"])

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for row, slot in enumerate(slots):
            token = self._left[slot][0] if self._left[slot] else EOS
            logits[row] = float("-inf")
            logits[row, token] = 0.0
        return logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        del self._left[slot][: len(token_ids)]

    def release(self, slot: int) -> None:
        del self._left[slot]


@hookimpl
def kvpage_logits_processors() -> list[LogitsProcessorRecord]:
    return [LogitsProcessorRecord(name="script", factory="scripted_model:Script")]


def engine_options() -> dict[str, Any]:
    """Of an engine whose model can be told what to write."""
    plugin = SimpleNamespace(kvpage_logits_processors=kvpage_logits_processors)
    return {
        "plugins": PluginRegistry([plugin], entry_points=False),
        "chat_template": TEMPLATE,
        "num_kv_blocks": 128,
    }


def says(server: ServedModel, text: str) -> dict[str, Any]:
    """Fields of a request whose answer is ``text``, then the end of the turn."""
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    script = tokenizer.encode(text, add_special_tokens=False)
    return {"logits_processors": ["script"], "vllm_xargs": {"script": script}}
