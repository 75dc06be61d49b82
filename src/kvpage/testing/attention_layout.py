"""The shape of one case, the environment a backend is made with for it, and what its KV layout must be able to hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from kvpage.api.attention import AttentionCaps, AttentionEnv
from kvpage.api.kv import KVLayout
from kvpage.testing.suite import ConformanceError

NARROW: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "int8": ("int8", "uint8"),
        "fp8_e4m3": ("float8_e4m3fn", "float8_e4m3fnuz", "uint8", "int8"),
        "fp8_e5m2": ("float8_e5m2", "float8_e5m2fnuz", "uint8", "int8"),
    }
)
"""KV dtypes that are no torch dtype's name or take packed values -> the dtypes their tensors may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The values of one case. ``kv_dtype`` and ``v_head_dim``: ``None`` = as the model's own."""

    dtype: str
    head_dim: int
    block_size: int
    num_heads: int = 4
    num_kv_heads: int = 2
    kv_dtype: str | None = None
    v_head_dim: int | None = None

    @property
    def value_dim(self) -> int:
        """Elements a head of V."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def __str__(self) -> str:
        kv = f", KV in {self.kv_dtype}" if self.kv_dtype else ""
        values = f", V head dim {self.v_head_dim}" if self.v_head_dim else ""
        return (
            f"{self.dtype}{kv}, {self.num_heads} heads on {self.num_kv_heads} KV heads, "
            f"head dim {self.head_dim}{values}, block size {self.block_size}"
        )


def environment(shape: Shape, device: str, **sizes: int) -> AttentionEnv:
    """What a backend is made with for a case; ``sizes`` are the pool's and the engine's."""
    return AttentionEnv(
        device=device,
        dtype=shape.dtype,
        kv_dtype=shape.kv_dtype or shape.dtype,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.value_dim,
        block_size=shape.block_size,
        **sizes,
    )


def require_layout(layout: object, env: AttentionEnv, caps: AttentionCaps) -> KVLayout:
    """``layout``, which a backend gave for ``env``, if K and V of every slot of the pool fit into it.

    Raises:
        ConformanceError: no KVLayout, another number of blocks, too small, or of a dtype that is not claimed.
    """
    __tracebackhide__ = True
    if not isinstance(layout, KVLayout):
        raise ConformanceError("layout", f"kv_layout() returned {layout!r:.80}, expected a KVLayout")
    shape = layout.shape
    if not isinstance(shape, tuple) or not all(type(size) is int and size > 0 for size in shape) or not shape:
        raise ConformanceError("layout", f"{layout}: shape must be a tuple of sizes of at least 1")
    if shape[0] != env.num_blocks:
        raise ConformanceError(
            "layout",
            f"{layout}: dimension 0 is {shape[0]}, expected {env.num_blocks}, env.num_blocks exactly: the engine counts "
            "the null block in, and hands out no block beyond",
        )
    allowed = _dtypes(env, caps)
    if layout.dtype not in allowed:
        known = isinstance(getattr(torch, str(layout.dtype), None), torch.dtype)
        wrong = "is not claimed" if known else "is no dtype of torch"
        raise ConformanceError(
            "layout",
            f"{layout}: dtype {layout.dtype!r} {wrong}; for KV in {env.kv_dtype} it may be {', '.join(sorted(allowed))}",
        )
    held = math.prod(shape) * torch_dtype(layout.dtype).itemsize
    needed = (
        env.num_blocks * env.block_size * env.num_kv_heads * (env.head_dim + env.v_head_dim) * _bytes(env)
    )
    if held < needed:
        raise ConformanceError(
            "layout",
            f"{layout} holds {held} bytes ({held // env.num_blocks} a block), expected {needed} ({needed // env.num_blocks}) "
            f"at least: K and V of {env.num_blocks} blocks of {env.block_size} tokens, {env.num_kv_heads} KV heads of "
            f"{env.head_dim} + {env.v_head_dim} elements in {env.kv_dtype}",
        )
    return layout


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name, which is known to be one."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _dtypes(env: AttentionEnv, caps: AttentionCaps) -> set[str]:
    """Raw bytes are always one's own affair, as long as there are enough of them."""
    names = {env.kv_dtype, *caps.dtypes, *NARROW.get(env.kv_dtype, ()), "uint8"}
    return {name for name in names if isinstance(getattr(torch, name, None), torch.dtype)}


def _bytes(env: AttentionEnv) -> int:
    """Of one stored element; 0 where the KV dtype is a plugin's own, of any size."""
    if env.kv_dtype in NARROW:
        return 1
    known = isinstance(getattr(torch, env.kv_dtype, None), torch.dtype)
    return torch_dtype(env.kv_dtype).itemsize if known else 0
