"""The builtin attention backend keeps the contract that third parties are held to; so does a wholly different one."""

from __future__ import annotations

from row_by_row_attention import RowByRowAttention

from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.testing.attention import AttentionBackendConformance


class TestReferenceAttention(AttentionBackendConformance):
    backend = ReferenceAttention


class TestRowByRowAttention(AttentionBackendConformance):
    """Shows that the suite asks for no layout of its own, and runs what the reference does not claim."""

    backend = RowByRowAttention
