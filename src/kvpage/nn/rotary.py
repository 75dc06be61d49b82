"""Rotary tables: frequencies of every rope kind, equal to the bit to transformers' ROPE_INIT_FUNCTIONS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvpage.api.attention import Rope
from kvpage.api.model import RopeSpec

Frequencies = tuple[torch.Tensor, float]
"""float32 [rotary_dim / 2], and the factor that cos and sin are multiplied by."""


def build_rope(
    spec: RopeSpec, max_model_len: int, device: torch.device | str, switch: int | None = None
) -> Rope:
    """Tables of ``spec`` for positions 0 .. max_model_len - 1, on ``device``.

    With ``switch``, the rows are those of positions 0 .. switch - 1 in sequences of at most ``switch`` tokens, then
    of positions 0 .. max_model_len - 1 in longer ones. For kinds that do not tell them apart both are the same.

    Raises:
        ValueError: ``spec.kind`` is none of ``FREQUENCIES`` (a family refuses such a checkpoint first).
    """
    if spec.kind not in FREQUENCIES:
        raise ValueError(f"rope kind {spec.kind!r} is unknown; known: {', '.join(FREQUENCIES)}")
    short = FREQUENCIES[spec.kind](spec)
    if switch is None:
        cos, sin = _table(short, max_model_len)
    else:
        long = LONG_FREQUENCIES.get(spec.kind, FREQUENCIES[spec.kind])(spec)
        parts = _table(short, switch), _table(long, max_model_len)
        cos, sin = torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])
    return Rope(
        cos=cos.to(device),
        sin=sin.to(device),
        rotary_dim=2 * len(short[0]),
        interleaved=spec.interleaved,
    )


def _table(frequencies: Frequencies, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 .. rows - 1."""
    positions = torch.arange(rows, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * frequencies[0]
    cos, sin = angles.cos(), angles.sin_()
    if frequencies[1] != 1.0:
        cos.mul_(frequencies[1])
        sin.mul_(frequencies[1])
    return cos, sin


def _powers(spec: RopeSpec, theta: float) -> torch.Tensor:
    """theta ** (2i / rotary_dim), float32 [rotary_dim / 2]."""
    exponents: torch.Tensor = (
        torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32, device="cpu") / spec.rotary_dim
    )
    powers: torch.Tensor = theta**exponents
    return powers


def _default(spec: RopeSpec) -> Frequencies:
    return 1.0 / _powers(spec, spec.theta), 1.0


def _linear(spec: RopeSpec) -> Frequencies:
    return 1.0 / _powers(spec, spec.theta) / spec.parameters["factor"], 1.0


def _dynamic(spec: RopeSpec) -> Frequencies:
    """NTK-aware scaling; transformers grows it with the longest sequence seen, here it is fixed at load."""
    factor = spec.parameters["factor"]
    trained = spec.parameters["max_position_embeddings"]
    length = max(spec.max_position, trained)
    growth = (factor * length / trained) - (factor - 1)
    theta = spec.theta * growth ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return 1.0 / _powers(spec, theta), 1.0


def _llama3(spec: RopeSpec) -> Frequencies:
    values = spec.parameters
    factor, low, high = values["factor"], values["low_freq_factor"], values["high_freq_factor"]
    trained = values["original_max_position_embeddings"]
    plain = 1.0 / _powers(spec, spec.theta)
    wavelength = 2 * math.pi / plain
    long, short = wavelength > trained / low, wavelength < trained / high
    scaled = torch.where(long, plain / factor, plain)
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~short & ~long, blended, scaled), 1.0


def _yarn(spec: RopeSpec) -> Frequencies:
    """arXiv:2309.00071."""
    values = spec.parameters
    trained = values["original_max_position_embeddings"]
    factor = values["factor"]
    dim = spec.rotary_dim

    def turns_at(rotations: float) -> float:
        return (dim * math.log(trained / (rotations * 2 * math.pi))) / (2 * math.log(spec.theta))

    low: float = turns_at(values.get("beta_fast") or 32)
    high: float = turns_at(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    powers = _powers(spec, spec.theta)
    extrapolated, interpolated = 1.0 / powers, 1.0 / (factor * powers)
    keep = 1 - ramp
    return interpolated * (1 - keep) + extrapolated * keep, _yarn_attention_factor(values, factor)


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    stated = values.get("attention_factor")
    if stated is not None:
        return float(stated)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    upper, lower = values.get("mscale"), values.get("mscale_all_dim")
    return mscale(upper) / mscale(lower) if upper and lower else mscale(1.0)


def _longrope(spec: RopeSpec) -> Frequencies:
    """arXiv:2402.13753, for sequences within the trained context."""
    return _stretched(spec, spec.parameters["short_factor"])


def _longrope_beyond(spec: RopeSpec) -> Frequencies:
    """The same for sequences beyond it."""
    return _stretched(spec, spec.parameters["long_factor"])


def _stretched(spec: RopeSpec, factors: Sequence[float]) -> Frequencies:
    values = spec.parameters
    trained = values["original_max_position_embeddings"]
    stated = values.get("attention_factor")
    factor = values["factor"]
    if stated is not None:
        attention_factor = float(stated)
    else:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    stretch = torch.tensor(factors, dtype=torch.float32, device="cpu")
    return 1.0 / (stretch * _powers(spec, spec.theta)), attention_factor


FREQUENCIES: Mapping[str, Callable[[RopeSpec], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
LONG_FREQUENCIES: Mapping[str, Callable[[RopeSpec], Frequencies]] = {"longrope": _longrope_beyond}
"""Of kinds whose sequences beyond ``RopeSpec.switch`` turn in another way."""
