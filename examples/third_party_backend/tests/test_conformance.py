"""What this distribution brings, proved by the suite that kvpage ships."""

from __future__ import annotations

from kvpage_example.attention import GatherAttention
from kvpage_example.processor import NoRepeatNgram

from kvpage.testing.attention import AttentionBackendConformance
from kvpage.testing.logits_processors import LogitsProcessorConformance


class TestGatherAttention(AttentionBackendConformance):
    backend = GatherAttention


class TestNoRepeatNgram(LogitsProcessorConformance):
    processor = NoRepeatNgram
    params = {"extra_args": {"no_repeat_ngram_size": 2}}
    other_params = {"extra_args": {"no_repeat_ngram_size": 3}}
    bad_params = (
        {"extra_args": {}},
        {"extra_args": {"no_repeat_ngram_size": 0}},
        {"extra_args": {"no_repeat_ngram_size": "3"}},
    )
