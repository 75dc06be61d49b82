"""Well-behaved logits processors pass the suite of logits processors."""

from __future__ import annotations

from small_processors import NoRepeat, Sharpen

from kvpage.testing.logits_processors import LogitsProcessorConformance


class TestNoRepeat(LogitsProcessorConformance):
    processor = NoRepeat
    params = {"extra_args": {"window": 4}}
    other_params = {"extra_args": {"window": 1}}
    bad_params = [{"extra_args": {"window": 0}}, {"extra_args": {"window": "wide"}}]


class TestSharpen(LogitsProcessorConformance):
    processor = Sharpen
