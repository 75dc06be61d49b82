"""Checkpoints of torchao as transformers writes them: a tensor subclass taken apart, described in the file's header.

Of ``m.weight`` there are ``m._weight_qdata``, ``m._weight_scale`` and mostly ``m._weight_zero_point``; the header's
metadata has JSON under "m.weight": the class, and the block [outputs, inputs] that shares a scale.
weight = (qdata - zero_point) * scale. https://github.com/pytorch/ao
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvpage import CheckpointError
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    Fp8,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorInfo,
    TensorSpec,
    WeightForm,
    metadata,
)

CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
TARGETS = tuple(f"int{bits}" for bits in range(1, 9))
SCALES = ("float32", "bfloat16", "float16")
QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
OF_ACTIVATIONS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point")
"""Scales for static int8 activations; these are rounded by each token instead, or not at all."""

PRE_SCALE = "_weight_act_pre_scale"
MAX_JSON_BYTES = 64 * 2**10
AGAIN = "download it again, or quantize it anew with torchao"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """What the header says of a weight.

    ``bits`` of its integers, 0 of 8-bit floats. ``block``: (outputs, inputs) that share a scale, () = all of them.
    ``parts``: the tensors that it was taken apart into.
    """

    bits: int
    block: tuple[int, ...]
    parts: tuple[str, ...]
    int8_activations: bool


class TorchAO(QuantScheme):
    """Reads int8, intx (1 to 8 bits, unpacked) and float8 e4m3 weights; 1 to 4 bits are packed as 4, more as 8.

    Layouts packed for one kernel (Int4TilePackedTo4dTensor and the like) are refused by name.
    """

    quantizes_tables = True

    def __init__(self, view: CheckpointView) -> None:
        self._view = view

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> TorchAO:
        """Raises CheckpointError: ``config`` has no quant_type. What a module holds is read from the file alone."""
        kind = config.get("quant_type")
        if not isinstance(kind, (str, Mapping)) or not kind:
            raise CheckpointError(
                f"quantization_config: quant_type must describe torchao's config, found {kind!r:.80}; restore config.json "
                "from where the checkpoint came from"
            )
        return cls(view)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        stored = self._stored(linear)
        if stored is None:
            return {}
        outputs, inputs = linear.out_features, linear.in_features
        rows, group = self._block(linear, stored)
        shape: tuple[int, ...] = (outputs // rows, inputs // group)
        cut, size = (0, rows) if linear.cut == "outputs" else (1, group)
        shard = cut if shape[cut] > 1 else None
        if shape == (1, 1) and self._info(linear, SCALE).shape == ():
            shape = ()
        scale = self._dtype(linear, SCALE, SCALES if stored.bits else SCALES[:1])
        codes = "int8" if stored.bits else "float8_e4m3fn"
        stated = {
            QDATA: TensorSpec(shape=(outputs, inputs), dtype=codes, shard_dim=cut),
            SCALE: TensorSpec(shape=shape, dtype=scale, shard_dim=shard, group=size),
        }
        if ZERO in stored.parts:
            zero = self._dtype(linear, ZERO, ("int8", *SCALES))
            stated[ZERO] = TensorSpec(shape=shape, dtype=zero, shard_dim=shard, group=size)
        for part in OF_ACTIVATIONS:
            if part in stored.parts:
                dtype = self._dtype(linear, part, (*SCALES, "int8"))
                stated[part] = TensorSpec(shape=self._info(linear, part).shape, dtype=dtype)
        return stated

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        stored = self._stored(linear)
        assert stored is not None, "tensors() named what is given here"
        codes, scale, zero = tensors[QDATA], tensors[SCALE], tensors.get(ZERO)
        if not bool(scale.isfinite().all()) or bool((scale < 0).any()):
            raise self._wrong(f"{linear.name}.{SCALE}", "finite scales of at least 0", "others")
        limit = 1 << stored.bits >> 1
        if stored.bits == 0:
            if bool((codes.view(torch.uint8) & 127 == 127).any()):
                raise self._wrong(f"{linear.name}.{QDATA}", "finite numbers", "NaN")
        elif stored.bits < 8:
            self._require_range(f"{linear.name}.{QDATA}", codes, limit)
        if zero is not None:
            self._require_range(f"{linear.name}.{ZERO}", zero, limit)
        return _form(stored, tensors, symmetric=zero is None or not bool(zero.any()))

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        """As ``to_form``; of the numbers it reads the zero points, which are left out where all are 0."""
        stored = self._stored(linear)
        if stored is None:
            return None
        stated = self.tensors(linear, view)
        empty = {
            suffix: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            for suffix, spec in stated.items()
        }
        symmetric = ZERO not in stated or not bool(view.read(f"{linear.name}.{ZERO}").any())
        return _form(stored, empty, symmetric=symmetric)

    def _stored(self, linear: LinearSpec) -> _Stored | None:
        """What the header says of ``linear``; ``None``: it is plain."""
        name = f"{linear.name}.weight"
        packed = f"{linear.name}.{QDATA}" in self._view.names()
        text = metadata(self._view).get(name)
        if text is None:
            if not packed:
                return None
            raise self._wrong(
                f"{linear.name}.{QDATA}", f"metadata under {name!r} in the file's header", "none"
            )
        if len(text) > MAX_JSON_BYTES:
            raise self._wrong(name, f"metadata of at most {MAX_JSON_BYTES} bytes", f"{len(text)}")
        try:
            said = json.loads(text)
            kind, values, parts = said["_type"], said.get("_data", {}), said.get("_tensor_data_names", [])
            block, known = values.get("block_size"), {f"_weight_{part}" for part in parts}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(name, "metadata that describes a tensor in JSON", f"{text!r:.80}") from error
        if kind == "Tensor":
            if packed:
                raise self._wrong(name, "a plain tensor by the header's metadata", QDATA)
            return None
        if kind not in CLASSES:
            raise CheckpointError(
                f"{self._view.where(f'{linear.name}.{QDATA}')}: {name!r} is a {kind!r:.60} of torchao; kvpage reads "
                f"{', '.join(CLASSES)}: quantize with Int8WeightOnlyConfig, IntxWeightOnlyConfig or Float8WeightOnlyConfig"
            )
        if PRE_SCALE in known:
            raise CheckpointError(
                f"{self._view.where(f'{linear.name}.{PRE_SCALE}')}: {name!r} has act_pre_scale (SmoothQuant), by which "
                "activations would be multiplied; quantize without it"
            )
        required = {QDATA, SCALE} | ({ZERO} if kind == CLASSES[1] else set())
        if not required <= known:
            raise self._wrong(name, f"metadata that names {', '.join(sorted(required))}", f"{sorted(known)}")
        whole = [] if block is None and kind == CLASSES[2] else block
        if not isinstance(whole, list) or not all(type(size) is int for size in whole):
            raise self._wrong(name, "block_size as a list of sizes", f"{block!r:.80}")
        return _Stored(
            bits=self._bits(name, kind, values.get("target_dtype")),
            block=tuple(whole),
            parts=tuple(sorted(known)),
            int8_activations=kind != CLASSES[2]
            and any(values.get(key) is not None for key in ("act_quant_kwargs", "activation_quantization")),
        )

    def _bits(self, name: str, kind: str, target: Any) -> int:
        if kind != CLASSES[1]:
            return 8 if kind == CLASSES[0] else 0
        stated = target.get("_data") if isinstance(target, dict) else None
        if stated not in TARGETS:
            raise self._wrong(name, f"target_dtype of {', '.join(TARGETS)}", f"{target!r:.80}")
        return TARGETS.index(stated) + 1

    def _block(self, linear: LinearSpec, stored: _Stored) -> tuple[int, int]:
        """(outputs, inputs) that share a scale; both divide the matrix."""
        shape = (linear.out_features, linear.in_features)
        block = stored.block or shape
        if len(block) != 2 or any(size < 1 or whole % size for size, whole in zip(block, shape, strict=True)):
            raise self._wrong(
                f"{linear.name}.weight", f"a block_size that divides {list(shape)}", f"{list(block)}"
            )
        return (block[0], block[1])

    def _info(self, linear: LinearSpec, part: str) -> TensorInfo:
        name = f"{linear.name}.{part}"
        if name not in self._view.names():
            raise self._wrong(name, "a tensor that the header's metadata names", "no such tensor")
        return self._view.info(name)

    def _dtype(self, linear: LinearSpec, part: str, known: tuple[str, ...]) -> str:
        """The dtype of ``part``, or the usual one where it has none of ``known``."""
        found = self._info(linear, part).dtype
        return found if found in known else known[0]

    def _require_range(self, name: str, values: torch.Tensor, limit: int) -> None:
        """``values`` are whole numbers of [-limit, limit)."""
        low, high = (float(value) for value in values.aminmax())
        whole = not values.is_floating_point() or bool((values == values.round()).all())
        if not (-limit <= low and high < limit and whole):
            raise self._wrong(name, f"whole numbers from {-limit} to {limit - 1}", f"{low:g} to {high:g}")

    def _wrong(self, name: str, expected: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self._view.where(name)}: {name!r}: expected {expected}, found {found}; {AGAIN}"
        )


def _form(stored: _Stored, tensors: Mapping[str, torch.Tensor], *, symmetric: bool) -> WeightForm:
    """The form of tensors that were checked, which may be of the device "meta"."""
    codes = tensors[QDATA]
    outputs, inputs = codes.shape
    scales = _by_output(tensors[SCALE], outputs)
    groups = scales.shape[1]
    if stored.bits == 0:
        return Fp8(codes=codes, scales=scales, group=inputs // groups)
    # An odd row has no whole bytes of 4-bit codes.
    wide = stored.bits > 4 or inputs % 2 == 1
    if wide and symmetric and groups == 1:
        activation: Literal["none", "per-token"] = "per-token" if stored.int8_activations else "none"
        return ChannelInt8(codes=codes, scales=scales.squeeze(1).float(), activation=activation)
    unsigned = codes.contiguous().view(torch.uint8)
    if wide:
        zero, unsigned = 128, unsigned ^ 128
    else:
        zero, unsigned = 8, (unsigned & 15) ^ 8
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return GroupedInt(
        codes=unsigned,
        scales=scales,
        group=inputs // groups,
        bits=8 if wide else 4,
        zero=zero,
        zeros=None
        if symmetric
        else (_by_output(tensors[ZERO], outputs).to(torch.int16) + zero).to(torch.uint8),
        activation="none" if wide else "per-group",
    )


def _by_output(values: torch.Tensor, outputs: int) -> torch.Tensor:
    """[blocks of outputs, groups], or one number for all -> [outputs, groups]."""
    table = values.reshape(1, 1) if values.dim() == 0 else values
    return table.repeat_interleave(outputs // table.shape[0], 0)
