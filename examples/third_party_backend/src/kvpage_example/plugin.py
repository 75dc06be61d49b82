"""What this distribution registers. kvpage imports this module to find plugins: keep it light (no torch)."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import AttentionBackendRecord, LogitsProcessorRecord

KVPAGE_API_VERSION = "1.0"
"""The oldest kvpage.api this plugin works with."""


@hookimpl
def kvpage_attention_backends() -> list[AttentionBackendRecord]:
    # Below the reference's -100: taken only where a user names it. Above, it would be every engine's default here.
    return [
        AttentionBackendRecord(
            name="gather-sdpa",
            factory="kvpage_example.attention:GatherAttention",
            priority=-200,
            summary="gathers each row's K and V, then torch's scaled_dot_product_attention",
        )
    ]


@hookimpl
def kvpage_logits_processors() -> list[LogitsProcessorRecord]:
    return [LogitsProcessorRecord(name="no_repeat_ngram", factory="kvpage_example.processor:NoRepeatNgram")]
