"""Norms, rounded exactly as transformers rounds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F

from kvpage.api.model import NormSpec
from kvpage.api.quant import WeightForm
from kvpage.nn.linear import dense

Norm: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""[..., H] -> a new tensor of the same shape and dtype, normed over the last dimension."""


def build_norm(spec: NormSpec, weights: Mapping[str, WeightForm], name: str) -> Norm:
    """The norm ``spec`` with the parameters ``name.weight`` and, where it has one, ``name.bias``."""
    weight = dense(weights[f"{name}.weight"])
    bias = dense(weights[f"{name}.bias"]) if spec.bias else None
    if weight.dim() == 2 and (spec.kind != "layer" or bias is not None):
        raise ValueError(f"{name}: with a weight for each head there are layer norms without bias only")
    if spec.kind == "layer":
        return LayerNorm(weight, bias, spec.eps) if weight.dim() == 1 else HeadLayerNorm(weight, spec.eps)
    if bias is not None:
        raise ValueError(f"{name}: a norm of kind {spec.kind!r} has no bias")
    if spec.kind == "rms1p":
        return RMSNormRoundedOnce(weight.float() + 1.0, spec.eps)
    if spec.kind == "rms32" and weight.dtype != torch.float32:
        return RMSNormRoundedOnce(weight.float(), spec.eps)
    return RMSNorm(weight, spec.eps)


class RMSNorm:
    """weight * x / rms(x): the quotient in float32, rounded to x's dtype before it is scaled (Llama)."""

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps, self._shape = weight, eps, tuple(weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self._shape, self._weight, self._eps)
        return normalise(x.float(), self._eps).to(x.dtype).mul_(self._weight)


class RMSNormRoundedOnce:
    """scale * x / rms(x), scaled in float32 and rounded once (Gemma, whose scale is 1 + weight; OLMo-2)."""

    __slots__ = ("_eps", "_scale")

    def __init__(self, scale: torch.Tensor, eps: float) -> None:
        self._scale, self._eps = scale, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(x.float(), self._eps).mul_(self._scale).to(x.dtype)


class LayerNorm:
    """(x - mean) / std * weight + bias, in float32 inside (arXiv:1607.06450)."""

    __slots__ = ("_bias", "_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self._weight, self._bias, self._eps, self._shape = weight, bias, eps, tuple(weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


class HeadLayerNorm:
    """[T, heads, D]: each head's (x - mean) / std * its own row of weight [heads, D], rounded once (Cohere)."""

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps, self._shape = weight.float(), eps, (weight.shape[-1],)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self._shape, eps=self._eps).mul_(self._weight).to(x.dtype)


def normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) over the last dimension of float32 ``x``; a new tensor."""
    return x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
