"""Parameters that share one tensor of a checkpoint, and tensors stored the other way round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from kvpage.api.model import AttentionSpec, WeightMap


def qkv_outputs(mixer: AttentionSpec) -> dict[str, int]:
    """Outputs of q, k and v, in the order in which fused tensors hold them."""
    return {
        "q": mixer.num_heads * mixer.head_dim,
        "k": mixer.num_kv_heads * mixer.head_dim,
        "v": mixer.num_kv_heads * mixer.v_head_dim,
    }


def one_after_another(weights: WeightMap, outputs: Mapping[str, int]) -> WeightMap:
    """``weights``, where the parts of each layer named in ``outputs`` lie so in one tensor.

    Args:
        outputs: part ("q", "gate") -> its outputs, in the tensor's order.
    """
    return _with_rows(weights, outputs, every=None)


def head_by_head(weights: WeightMap, head_dim: int) -> WeightMap:
    """``weights``, where q, k and v lie in one tensor that has them for the first head, then the second ..."""
    return _with_rows(weights, dict.fromkeys("qkv", head_dim), every=3 * head_dim)


def transposed(weights: WeightMap, parts: Collection[str]) -> WeightMap:
    """``weights``, where the matrices of the layers' ``parts`` are stored [in, out]."""
    return {
        name: replace(ref, transpose=True) if _part(name) in parts and name.endswith(".weight") else ref
        for name, ref in weights.items()
    }


def _with_rows(weights: WeightMap, outputs: Mapping[str, int], every: int | None) -> WeightMap:
    rows: dict[str, tuple[int, int]] = {}
    start = 0
    for part, count in outputs.items():
        rows[part] = (start, start + count)
        start += count
    return {
        name: replace(ref, rows=rows[_part(name)], every=every) if _part(name) in rows else ref
        for name, ref in weights.items()
    }


def _part(name: str) -> str:
    """ "q" of "layers.3.attention.q.weight"."""
    return name.split(".")[-2]
