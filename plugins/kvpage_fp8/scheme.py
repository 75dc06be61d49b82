"""8-bit floats as vLLM, AutoFP8, DeepSeek, transformers ("fp8") and FBGEMM ("fbgemm_fp8") store them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, Fp8, LinearSpec, QuantScheme, TensorInfo, TensorSpec

PLAIN = ("bfloat16", "float16", "float32", "float64")
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
"""Dtypes of a weight's scales; the last has powers of two only ("ue8m0")."""

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
"""Both multiply. The first is vLLM's and AutoFP8's, the second DeepSeek's and transformers'."""

INPUT_SCALES = {"weight_scale": "input_scale", "weight_scale_inv": "activation_scale"}
"""How the same tools name the static scale of activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a matrix is stored.

    Attributes:
        block: outputs and inputs that share a scale; ``None`` = all.
        by_output: one scale an output instead (FBGEMM).
        static: a scale of its activations is stored beside it.
    """

    block: tuple[int, int] | None = None
    by_output: bool = False
    static: bool = False

    def of(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The block of a matrix of that size."""
        if self.by_output:
            return (1, in_features)
        return self.block or (out_features, in_features)


class Fp8Checkpoint(QuantScheme):
    """weight = codes * scale, in E4M3, with one float32 scale a tensor, an output or a block of both.

    A block's scale may be a power of two of 8 bits (E8M0, ``scale_fmt`` "ue8m0"); blocks at the edges may be cut off.
    Which matrices are quantized the file says: one that has a plain weight and no scale is plain, as transformers
    leaves those that its blocks do not divide.

    The checkpoint's scales of activations, static or dynamic, bounds of theirs and those of an fp8 KV cache are not
    used: activations stay in the model's dtype, which is the more exact of the two.
    """

    def __init__(self, layout: Layout, ignored: Collection[str], view: CheckpointView) -> None:
        self._layout, self._view = layout, view
        self._ignored = tuple(f".{name}." for name in ignored)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Fp8Checkpoint:
        """``quant_method`` fp8: activation_scheme, weight_block_size, scale_fmt, fmt, ignored_layers,
        modules_to_not_convert; fbgemm_fp8: activation_scale_ub, modules_to_not_convert."""
        ignored: list[str] = []
        for key in ("ignored_layers", "modules_to_not_convert"):
            names = config.get(key) or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise _wrong(key, "a list of module names", names)
            ignored += names
        if config.get("quant_method") == "fbgemm_fp8":
            bound = config.get("activation_scale_ub")
            if bound is not None and not _positive(bound):
                raise _wrong("activation_scale_ub", "a number above 0", bound)
            return cls(Layout(by_output=True), ignored, view)
        return cls(_layout(config), ignored, view)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        names = view.names()
        weight = f"{linear.name}.weight"
        scale = self._scale_name(linear, names)
        found = view.info(weight).dtype if weight in names else None
        scaled = f"{linear.name}.{scale}" in names
        if self._is_ignored(linear.name):
            if scaled or (found is not None and found not in PLAIN):
                held = f"{found or 'no weight'} with {scale}" if scaled else found
                raise CheckpointError(
                    f"{view.where(weight)}: tensor {weight!r} should be plain ({', '.join(PLAIN)}), since "
                    f"quantization_config leaves {linear.name!r} out, found {held}; config.json and weights are not of "
                    "one checkpoint"
                )
            return {}
        if found in PLAIN and not scaled:
            return {}
        out, inputs = linear.out_features, linear.in_features
        rows, columns = self._layout.of(out, inputs)
        cut = _cut(linear, rows, columns)
        specs = {
            "weight": TensorSpec(shape=(out, inputs), dtype="float8_e4m3fn", shard_dim=cut),
            scale: self._scale_spec(linear, _info(view, f"{linear.name}.{scale}"), cut),
        }
        if self._layout.static:
            name = self._input_scale_name(linear, scale, names)
            info = _info(view, f"{linear.name}.{name}")
            specs[name] = TensorSpec(shape=_one(info), dtype=_dtype(info))
        return specs

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Fp8:
        for suffix, tensor in tensors.items():
            if suffix != "weight":
                self._check_scale(linear, suffix, tensor)
        codes = tensors["weight"]
        scales = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
        if scales.numel() == 1:
            scales = scales.reshape(1, 1)
        form = Fp8.of_blocks(codes, scales, self._layout.of(linear.out_features, linear.in_features))
        # E4M3 has two NaN and no infinity; isnan() is a hundred times as slow.
        if not codes.is_meta and bool(codes.view(torch.uint8).bitwise_and(0x7F).eq_(0x7F).any()):
            raise self._damaged(linear, "weight", "finite numbers", "NaN (byte 0x7F or 0xFF)")
        return form

    def _scale_spec(self, linear: LinearSpec, info: TensorInfo | None, cut: int | None) -> TensorSpec:
        out, inputs = linear.out_features, linear.in_features
        if self._layout.block is None and not self._layout.by_output:
            return TensorSpec(shape=_one(info), dtype=_dtype(info))
        rows, columns = self._layout.of(out, inputs)
        return TensorSpec(
            shape=(-(-out // rows), -(-inputs // columns)),
            dtype=_dtype(info),
            # One scale an output serves all inputs.
            shard_dim=None if self._layout.by_output and cut == 1 else cut,
            group=columns if cut == 1 and not self._layout.by_output else rows,
        )

    def _scale_name(self, linear: LinearSpec, names: Collection[str]) -> str:
        expected = WEIGHT_SCALES if self._layout.block is None else WEIGHT_SCALES[::-1]
        return next((suffix for suffix in expected if f"{linear.name}.{suffix}" in names), expected[0])

    def _input_scale_name(self, linear: LinearSpec, scale: str, names: Collection[str]) -> str:
        """The one that belongs to ``scale``, or the other tools' where only that is there."""
        expected = INPUT_SCALES[scale]
        return next(
            (suffix for suffix in (expected, *INPUT_SCALES.values()) if f"{linear.name}.{suffix}" in names),
            expected,
        )

    def _is_ignored(self, module: str) -> bool:
        """Whether one of the names is the module's, or some components of it ("mlp.gate", "visual")."""
        return any(name in f".{module}." for name in self._ignored)

    def _check_scale(self, linear: LinearSpec, suffix: str, scale: torch.Tensor) -> None:
        if scale.is_meta:
            return
        values = scale.float()
        wrong = values[~(values.isfinite() & (values >= 0))]
        if wrong.numel():
            raise self._damaged(linear, suffix, "finite scales of at least 0", f"{float(wrong[0])}")

    def _damaged(self, linear: LinearSpec, suffix: str, expected: str, found: str) -> CheckpointError:
        name = f"{linear.name}.{suffix}"
        return CheckpointError(
            f"{self._view.where(name)}: tensor {name!r} should hold {expected}, found {found}; download the file again, "
            "or quantize the model anew"
        )


def _layout(config: Mapping[str, Any]) -> Layout:
    """What ``quant_method`` fp8 says."""
    scheme = config.get("activation_scheme") or "dynamic"
    if scheme not in ("static", "dynamic"):
        raise _wrong("activation_scheme", "static or dynamic", scheme)
    block = config.get("weight_block_size")
    if block is not None:
        sizes = isinstance(block, list | tuple) and len(block) == 2
        if not sizes or not all(type(size) is int and size > 0 for size in block):
            raise _wrong("weight_block_size", "two sizes above 0 [outputs, inputs] or null", block)
        if scheme == "static":
            raise _wrong("activation_scheme", f"dynamic, beside weight_block_size {list(block)}", scheme)
    for key, known in (("scale_fmt", ("ue8m0", "float")), ("fmt", ("e4m3", "float8_e4m3fn", "fp8"))):
        value = config.get(key)
        if value is not None and value not in known:
            raise _wrong(key, f"{', '.join(known)} or null", value)
    return Layout(block=None if block is None else (block[0], block[1]), static=scheme == "static")


def _cut(linear: LinearSpec, rows: int, columns: int) -> int | None:
    """The dimension that ranks cut, where it has whole blocks of ``rows`` outputs and ``columns`` inputs."""
    if linear.cut == "outputs":
        whole = linear.out_features % rows == 0
        return 0 if whole else None
    return 1 if linear.in_features % columns == 0 else None


def _info(view: CheckpointView, name: str) -> TensorInfo | None:
    return view.info(name) if name in view.names() else None


def _one(info: TensorInfo | None) -> tuple[int, ...]:
    """The shape of a single number: as it is stored, of at most two dimensions."""
    return info.shape if info is not None and info.shape in ((), (1,), (1, 1)) else ()


def _dtype(info: TensorInfo | None) -> str:
    return info.dtype if info is not None and info.dtype in SCALES else SCALES[0]


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


def _wrong(key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"quantization_config (fp8): {key} should be {expected}, found {found!r:.80}; use a checkpoint that states it "
        "so, or the unquantized one"
    )
