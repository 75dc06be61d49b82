"""kvpage's own decoder passes the suite of decoder backends, over the reference attention."""

from __future__ import annotations

from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.models.decoder import TorchDecoder
from kvpage.testing.decoder_backends import DecoderBackendConformance
from kvpage.testing.decoder_models import sample_specs


class TestTorchDecoder(DecoderBackendConformance):
    decoder = TorchDecoder
    attention_backend = ReferenceAttention
    must_build = tuple(sample_specs(8))
