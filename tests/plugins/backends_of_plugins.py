"""Attention backends, decoder backends, readers and kernels that plugins of these tests register by import string."""

from __future__ import annotations

from typing import Any, ClassVar

from kvpage.api.attention import AttentionBackend, AttentionCaps, AttentionNeed
from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.decoder import DecoderBackend, Reasons
from kvpage.api.quant import LinearKernel

DTYPES = frozenset({"float32", "bfloat16"})


class Attention(AttentionBackend):
    """Serves anything without features; never run."""

    caps = AttentionCaps(devices=frozenset({"cpu"}), dtypes=DTYPES)

    def kv_layout(self) -> Any: ...
    def plan(self, batch: Any) -> object: ...
    def write_kv(self, *given: Any) -> None: ...
    def attend(self, *given: Any) -> None: ...
    def copy_blocks(self, *given: Any) -> None: ...


class SmallHeads(Attention):
    caps = AttentionCaps(
        devices=frozenset({"cpu"}), dtypes=DTYPES, head_dims=frozenset({32}), preferred_block_size=8
    )


class BrokenCaps(Attention):
    caps: ClassVar[Any] = None


class NoBackend:
    caps = Attention.caps


class Model:
    def forward(self, *given: Any) -> None: ...
    def logits(self, *given: Any) -> None: ...


class Decoder(DecoderBackend):
    def build(self, spec: Any, weights: Any, env: Any) -> Any:
        return Model()


class Refuses(Decoder):
    @classmethod
    def refuses(cls, spec: Any, env: Any) -> list[str]:
        return ["it has a window", "it is too deep"]


class RaisesWhenAsked(Decoder):
    @classmethod
    def refuses(cls, spec: Any, env: Any) -> list[str]:
        raise OSError("no driver")


class OverSmallHeads(Decoder):
    attention = "small"


class OverAttention(Decoder):
    attention = "plain"


class Declines(Decoder):
    def build(self, spec: Any, weights: Any, env: Any) -> Any:
        return Reasons(("its weights are not packed",))


class RaisesWhenBuilt(Decoder):
    def build(self, spec: Any, weights: Any, env: Any) -> Any:
        raise RuntimeError("no kernel image")


class BuildsNothing(Decoder):
    def build(self, spec: Any, weights: Any, env: Any) -> Any:
        return None


class Kernel(LinearKernel):
    name = "kernel"

    @classmethod
    def supports(cls, form: Any, env: Any) -> list[str]:
        return ["never"]

    def prepare(self, form: Any, bias: Any) -> None: ...
    def forward(self, x: Any) -> Any: ...


class Reader(CheckpointReader):
    def weights(self) -> Any: ...


NEED = AttentionNeed(device="cpu", dtype="float32", kv_dtype="float32", head_dims=frozenset({64}))
