"""The builtin attention backend keeps the contract that third parties are held to."""

from __future__ import annotations

from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.testing.attention import AttentionBackendConformance


class TestReferenceAttention(AttentionBackendConformance):
    backend = ReferenceAttention
