"""From qweight, qzeros, scales and g_idx to a form: weight[n, k] = scales[g, n] * (q[k, n] - zero[g, n]), g = g_idx[k]."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import CheckpointError
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorInfo,
    TensorSpec,
    WeightForm,
)
from kvpage_gptq.packing import raised_by, unpacked, weight_codes, zero_points
from kvpage_gptq.settings import ModuleSettings, Settings, read_settings

logger = logging.getLogger("kvpage")
SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Groups:
    """The columns of a form: runs of ``size`` that share a scale.

    Attributes:
        rows: int64 [in / size]: the stored group of each run.
        order: int64 [in]: the input of each column; ``None``: as they are.
    """

    size: int
    rows: torch.Tensor
    order: torch.Tensor | None = None


class Gptq(QuantScheme):
    """Matrices of 2, 3, 4 and 8 bits in groups of inputs; which modules are such is read from the file."""

    def __init__(self, settings: ModuleSettings, where: Callable[[str], str]) -> None:
        """``where``: the file of a tensor, for error messages."""
        self._settings, self._where = settings, where
        self._warned = False

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Gptq:
        return cls(read_settings(config), view.where)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        """g_idx is among them only where it says more than that groups lie side by side."""
        names = view.names()
        if not any(f"{linear.name}.{suffix}" in names for suffix in ("qweight", "qzeros", "scales")):
            return {}
        settings = self._settings.of(linear.name)
        self._check_sizes(linear, settings)
        inputs, outputs, bits = linear.in_features, linear.out_features, settings.bits
        groups = math.ceil(inputs / _group_size(settings, inputs))
        floats = f"{linear.name}.scales"
        dtype = view.info(floats).dtype if floats in names else "float16"
        specs = {
            "qweight": TensorSpec(shape=(inputs * bits // 32, outputs), dtype="int32"),
            "qzeros": TensorSpec(shape=(groups, outputs * bits // 32), dtype="int32"),
            "scales": TensorSpec(shape=(groups, outputs), dtype=dtype if dtype in SCALES else "float16"),
        }
        g_idx = self._needs_g_idx(linear, view, settings, groups)
        specs = _cut(specs, linear, settings, groups, by_inputs=not g_idx)
        if g_idx:
            specs["g_idx"] = TensorSpec(shape=(inputs,), dtype="int32")
        return specs

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        settings = self._settings.of(linear.name)
        self._check_scales(linear, tensors["scales"])
        self._check_zeros(linear, settings, tensors["qzeros"])
        return self._form(linear, settings, tensors)

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        """g_idx is read: it says how many scales there are."""
        tensors = {}
        for suffix, spec in self.tensors(linear, view).items():
            name = f"{linear.name}.{suffix}"
            if suffix == "g_idx" and name in view.names() and view.info(name) == _info(spec):
                tensors[suffix] = view.read(name)
            else:
                tensors[suffix] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        if not tensors or ("g_idx" in tensors and tensors["g_idx"].is_meta):
            return None
        return self._form(linear, self._settings.of(linear.name), tensors)

    def _form(
        self, linear: LinearSpec, settings: Settings, tensors: Mapping[str, torch.Tensor]
    ) -> WeightForm:
        """The form of tensors that were checked; of those on the device "meta" too, but for g_idx."""
        bits, stored = settings.bits, tensors["scales"]
        groups = self._groups(linear, settings, stored.shape[0], tensors.get("g_idx"))
        rows = groups.rows.to(stored.device)
        order = None if groups.order is None else groups.order.to(stored.device)
        codes = weight_codes(tensors["qweight"], bits, order)
        scales = stored.t().index_select(1, rows)
        if bits == 8 and settings.symmetric and groups.size == linear.in_features:
            return ChannelInt8(
                codes=codes.bitwise_xor(128).view(torch.int8), scales=scales.float().squeeze(1)
            )
        zeros = None
        if not settings.symmetric:
            zeros = zero_points(tensors["qzeros"], bits, settings.version).index_select(1, rows)
            # A zero point of 8 bits may be 256 in the form, and kernels take one dtype.
            zeros = zeros.to(torch.int16) if bits == 8 else zeros.add_(raised_by(bits))
        return GroupedInt(
            bits=8 if bits == 8 else 4,
            zero=128 if bits == 8 else 8,
            codes=codes,
            scales=scales,
            zeros=zeros,
            group=groups.size,
            permutation=None if order is None else order.to(torch.int32),
            activation="none" if bits == 8 else "per-group",
        )

    def _groups(
        self, linear: LinearSpec, settings: Settings, count: int, g_idx: torch.Tensor | None
    ) -> Groups:
        """How columns share the ``count`` stored scales; groups that are not all of one size are split evenly."""
        inputs = linear.in_features
        if g_idx is None:
            stored = _group_size(settings, inputs)
            size = math.gcd(stored, inputs)
            return Groups(size, torch.arange(0, inputs, size, device="cpu") // stored)
        outside = (g_idx < 0) | (g_idx >= count)
        if bool(outside.any()):
            self._refuse(linear, "g_idx", f"groups of 0 to {count - 1}", int(g_idx[outside][0]))
        order = g_idx.argsort(stable=True)
        ordered = g_idx[order]
        starts = (ordered[1:] != ordered[:-1]).nonzero().flatten() + 1
        size = math.gcd(inputs, *starts.tolist())
        return Groups(size, ordered[::size].long(), None if bool((ordered == g_idx).all()) else order)

    def _needs_g_idx(self, linear: LinearSpec, view: CheckpointView, settings: Settings, groups: int) -> bool:
        name = f"{linear.name}.g_idx"
        if name not in view.names():
            return settings.act_order and groups > 1
        inputs = linear.in_features
        if view.info(name) != TensorInfo(shape=(inputs,), dtype="int32"):
            return True  # the loader says what it should be
        side_by_side = torch.arange(inputs, dtype=torch.int32, device="cpu") // _group_size(settings, inputs)
        return not torch.equal(view.read(name), side_by_side)

    def _check_sizes(self, linear: LinearSpec, settings: Settings) -> None:
        """Both sizes must fill words of 32 bits; of 3 bits three words."""
        values = 32 // math.gcd(32, settings.bits)
        sizes = {"qweight": ("inputs", linear.in_features), "qzeros": ("outputs", linear.out_features)}
        for suffix, (what, size) in sizes.items():
            if size % values:
                self._refuse(
                    linear,
                    suffix,
                    f"{what} that {values} divides, for {settings.bits} bits",
                    f"{size} {what}",
                )

    def _check_scales(self, linear: LinearSpec, scales: torch.Tensor) -> None:
        """A scale of 0 is a dead column."""
        wrong = ~(scales.isfinite() & (scales >= 0))
        if bool(wrong.any()):
            self._refuse(linear, "scales", "finite numbers of at least 0", float(scales[wrong][0]))

    def _check_zeros(self, linear: LinearSpec, settings: Settings, qzeros: torch.Tensor) -> None:
        bits, highest = settings.bits, 2**settings.bits - 1
        if not settings.symmetric and settings.version == 2:
            return
        stored = unpacked(qzeros.t(), bits)
        if settings.symmetric:
            expected = 2 ** (bits - 1) - (settings.version == 1)
            wrong = stored[stored != expected]
            if wrong.numel():
                other, name = (2, "gptq_v2") if settings.version == 1 else (1, "gptq")
                # All of them are what the other version stores.
                mislabelled = bool((stored == 2 ** (bits - 1) - (other == 1)).all())
                way_out = f'set its checkpoint_format to "{name}"' if mislabelled else "set its sym to false"
                self._refuse(
                    linear,
                    "qzeros",
                    f"only {expected}, since quantization_config says sym",
                    int(wrong[0]),
                    way_out,
                )
        elif not self._warned and bool((stored == highest).any()):
            self._warned = True
            name = f"{linear.name}.qzeros"
            logger.warning(
                "%s: tensor %r holds zero points of %d, which a zero point of 0 becomes in version 1 of the GPTQ format: "
                "files of gptqmodel are read exactly, but auto-gptq damages the outputs beside it; if answers are poor, "
                "quantize it again as gptq_v2 or with sym=true",
                self._where(name), name, highest,
            )  # fmt: skip

    def _refuse(
        self, linear: LinearSpec, suffix: str, expected: str, found: object, way_out: str | None = None
    ) -> None:
        name = f"{linear.name}.{suffix}"
        raise CheckpointError(
            f"{self._where(name)}: tensor {name!r} should have {expected}, found {found}; "
            f"{way_out or 'the file is damaged, or quantization_config belongs to another: download it again'}"
        )


def _group_size(settings: Settings, inputs: int) -> int:
    return inputs if settings.group_size == -1 else min(settings.group_size, inputs)


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(shape=spec.shape, dtype=spec.dtype)


def _cut(
    specs: dict[str, TensorSpec], linear: LinearSpec, settings: Settings, groups: int, *, by_inputs: bool
) -> dict[str, TensorSpec]:
    """With the dimensions that ranks cut, where they may: 32 values of 3 bits share three words, and groups that are
    of inputs here and there (``by_inputs`` false), or do not divide them, would be torn apart."""
    size = _group_size(settings, linear.in_features)
    whole = linear.cut == "inputs" and not (by_inputs and linear.in_features % size == 0)
    if settings.bits == 3 or whole:
        return specs
    pack = 32 // settings.bits

    def cut(suffix: str, dimension: int, pack: int = 1, group: int = 1) -> TensorSpec:
        spec = specs[suffix]
        return TensorSpec(shape=spec.shape, dtype=spec.dtype, shard_dim=dimension, pack=pack, group=group)

    if linear.cut == "outputs":
        return {"qweight": cut("qweight", 1), "qzeros": cut("qzeros", 1, pack), "scales": cut("scales", 1)}
    if groups == 1:
        return {**specs, "qweight": cut("qweight", 0, pack)}
    return {
        "qweight": cut("qweight", 0, pack),
        "qzeros": cut("qzeros", 0, group=size),
        "scales": cut("scales", 0, group=size),
    }
