"""The contract of an attention backend: where K and V live, and how queries attend to them.

T tokens in a step, B rows (one a sequence), Hq / Hkv query and KV heads, D head dim, bs block size,
NB blocks in the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from kvpage.api.kv import KVLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCaps:
    """What a backend can do; what it does not state it is not asked to do.

    Attributes:
        devices: torch device types ("cpu", "cuda").
        dtypes: of q, k, v ("float32", "bfloat16", "float16").
        kv_dtypes: of the cache, beyond the model's own dtype ("int8", "fp8_e4m3").
        head_dims: elements a head, of K and of V; ``None`` = any. block_sizes: likewise.
        preferred_block_size: what ``block_size=None`` gives.
        graph: "decode" if a decode step may be captured in a CUDA / HIP graph.
        features: of {"window", "softcap", "sinks", "v_head_dim"}.
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    kv_dtypes: frozenset[str] = frozenset()
    head_dims: frozenset[int] | None = None
    block_sizes: frozenset[int] | None = None
    preferred_block_size: int = 16
    graph: Literal["none", "decode"] = "none"
    features: frozenset[str] = frozenset()

    def missing(self, need: AttentionNeed) -> list[str]:
        """Why this backend cannot serve ``need``; empty if it can."""
        reasons = []
        if need.device not in self.devices:
            reasons.append(f"device {need.device} (has {_names(self.devices)})")
        if need.dtype not in self.dtypes:
            reasons.append(f"dtype {need.dtype} (has {_names(self.dtypes)})")
        if need.kv_dtype != need.dtype and need.kv_dtype not in self.kv_dtypes:
            reasons.append(
                f"KV dtype {need.kv_dtype} (has {_names(self.kv_dtypes) or 'only the dtype of the model'})"
            )
        if self.head_dims is not None and not need.head_dims <= self.head_dims:
            reasons.append(
                f"head dim {_names(need.head_dims - self.head_dims)} (has {_names(self.head_dims)})"
            )
        if self.block_sizes is not None and need.block_size not in {None, *self.block_sizes}:
            reasons.append(f"block size {need.block_size} (has {_names(self.block_sizes)})")
        lacking = need.features - self.features
        if lacking:
            reasons.append(f"feature {_names(lacking)} (has {_names(self.features)})")
        return reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionNeed:
    """What one engine needs of its attention backend. ``block_size=None``: the backend's preferred one."""

    device: str
    dtype: str
    kv_dtype: str
    head_dims: frozenset[int]
    block_size: int | None = None
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionEnv:
    """The fixed values a backend is made with; one backend object serves one KV group of one engine.

    ``device`` is a torch device string, ``dtype`` and ``kv_dtype`` torch dtype names; the rest are counts:
    heads on this rank, elements a head, tokens a block, and the engine's limits.
    """

    device: str
    dtype: str
    kv_dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayer:
    """What differs from layer to layer.

    Attributes:
        index: of the layer's KV tensor within its group.
        scale: multiplies q.k before softmax.
        window: a query at position p sees keys p-window+1 .. p; ``None`` = all before it.
        softcap: scores become softcap * tanh(score / softcap), before masking; ``None`` = off.
        sinks: float32 [Hq], a logit a head that joins the softmax and has no value; ``None`` = off.
    """

    index: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary tables of one layer kind: cos, sin float32 [rows, rotary_dim / 2], one row a position.

    A model of which long sequences turn by other frequencies (longrope) has the rows of those after the others; the
    positions that come with a step say which row each token takes. Rotates the first ``rotary_dim`` elements of each head: pairs (i, i + rotary_dim/2), or (2i, 2i+1) where
    ``interleaved``. RoFormer, arXiv:2104.09864.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    interleaved: bool = False


@dataclass(slots=True)
class AttentionBatch:
    """All that a backend learns about a step, for one KV group. Valid until the next step.

    The tensors are read, never written; the next step may use their memory again. A padding row has length 0, a
    table of zeros and any number of tokens, all with slot -1; tokens from cu_seqlens_q[B] on are padding too. What
    q, k and v hold for padding tokens is undefined, NaN included. A row may have KV and no token in this step.

    Attributes:
        num_tokens, num_rows: T, B, padding included.
        num_short: rows [0, num_short) are decode or verify rows, the rest prompt chunks: a hint, not a mode, which
            never changes a result.
        cu_seqlens_q: int32 [B+1], row i owns tokens cu_seqlens_q[i] .. cu_seqlens_q[i+1].
        seq_lens: int32 [B], KV length of each row after this step; 0 for a padding row.
        block_tables: int32 [B, max_blocks], pool block of each logical block; 0 = the null block: behind the window
            of the row's first query, and after the row's last block. Each row is contiguous; stride(0) may be more
            than max_blocks. Rows may name the same blocks.
        slot_mapping: int64 [T], block * bs + offset where the token's K and V go; -1 = padding, write nothing.
        q_lens_host, seq_lens_host: the same lengths on the host, as upper bounds; for planners.
        max_query_len, max_seq_len: largest of them.
        static: True where everything a launch fixes may depend only on ``num_rows`` and the engine's limits. Then
            each row has one token, padding rows come last, the tensors keep their addresses from step to step, and
            ``plan`` returns the same object for the same ``num_rows``. Only given to a backend whose caps say
            ``graph="decode"``.
    """

    num_tokens: int
    num_rows: int
    num_short: int
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    q_lens_host: Sequence[int] = field(default_factory=list)
    seq_lens_host: Sequence[int] = field(default_factory=list)
    max_query_len: int = 0
    max_seq_len: int = 0
    static: bool = False


class AttentionBackend(ABC):
    """The smallest thing a third party ships to run kvpage on their hardware.

    Within a step the engine calls ``copy_blocks``, then ``plan`` once, then for every layer ``rope_write`` (or
    ``write_kv``) and ``attend``: the K and V of all rows of a layer are written before any row attends, so
    that sequences may share blocks filled in the same step.

    An engine makes one object on trial for each KV group, over few blocks and before it reads weights, then those that it
    runs. ``__init__`` may raise to say that it cannot serve here (no device, no driver): the next backend is taken, and
    the log has the reason; a user who named this one gets it as the error.

    q, k and v may be views with any strides but the last, which is 1; ``out`` is contiguous. Block 0 of the pool,
    the null block, is never written and may hold anything. An object keeps nothing outside of itself: several
    live side by side. ``kvpage.testing.attention`` proves all of this of a subclass.
    """

    caps: ClassVar[AttentionCaps]

    def __init__(self, env: AttentionEnv) -> None:
        self.env = env

    @abstractmethod
    def kv_layout(self) -> KVLayout:
        """Shape and dtype of one layer's KV tensor; the engine allocates it, zeroed, and owns it."""

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> object:
        """Called once a step, before any layer; what it returns is given to every ``attend`` of the step.

        Layers of one step may differ in scale, window, softcap and sinks. What is made here follows the values of
        ``batch``, not its shape: the next step may bring other rows in the same memory.
        """

    @abstractmethod
    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        """Store k [T, Hkv, D] and v [T, Hkv, Dv] at ``batch.slot_mapping``: these slots, and not a byte besides."""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: AttentionLayer,
        batch: AttentionBatch,
        plan: object,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of q [T, Hq, D] over each row's KV into out [T, Hq, Dv].

        The last query of a row sits at position seq_len - 1. Query head h reads KV head h // (Hq / Hkv). Cache
        slots beyond a row's length, blocks that it does not own and those behind its window may hold anything, NaN
        included. q and the cache are only read. ``out`` of padding tokens may hold anything afterwards. A row's
        result should not depend, to the bit, on the other rows; a backend that cannot promise that says so.
        """

    @abstractmethod
    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy blocks source[i] -> target[i] (int64 [N], N >= 0) of one layer's KV tensor, bit by bit.

        A source may be there several times; no target is twice, or also a source. Calls take effect in their order.
        """

    def rope_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope | None,
        kv: torch.Tensor,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q and k by rows ``positions`` int64 [T] of ``rope`` (``None``: not at all), then ``write_kv``.

        Returns the rotated (q, k); the caller reads no others, so that a backend may rotate in place. Backends may
        fuse the two; the rotation is in float32 and rounded once to the dtype of q and k, as ``rotate`` does it.
        """
        if rope is not None:
            q, k = rotate(q, positions, rope), rotate(k, positions, rope)
        self.write_kv(kv, k, v, batch)
        return q, k


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """x [T, H, D] rotated for positions int64 [T], in float32 where x is narrower; a new tensor of x's dtype."""
    rotary = rope.rotary_dim
    half = rotary // 2
    cos = rope.cos[positions].unsqueeze(1)
    sin = rope.sin[positions].unsqueeze(1)
    turned = x[..., :rotary].float()
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    out = x.clone() if rotary < x.shape[-1] else x.new_empty(x.shape)
    target = out[..., :rotary]
    if rope.interleaved:
        target[..., 0::2] = first * cos - second * sin
        target[..., 1::2] = second * cos + first * sin
    else:
        target[..., :half] = first * cos - second * sin
        target[..., half:] = second * cos + first * sin
    return out


def _names(values: frozenset[str] | frozenset[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))
