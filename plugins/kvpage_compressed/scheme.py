"""The compressed-tensors formats: which tensors hold a matrix, and the form they stand for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from kvpage import CheckpointError
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    Fp8,
    GroupedInt,
    LinearSpec,
    QuantScheme,
    TensorSpec,
    WeightForm,
)
from kvpage_compressed.config import Group, Targets, read_groups, wrong
from kvpage_compressed.packing import in_bytes, nibbles, unpack, words

LOG = logging.getLogger("kvpage")
PLAIN = ("bfloat16", "float16", "float32", "float64")
SCALES = ("bfloat16", "float16", "float32")
KINDS = ("Linear", "Embedding")
"""Classes that targets may name: of matrices that multiply, and of the token embedding."""

ALL_PADDED_BEFORE, STREAM_SINCE = (0, 17), (0, 18)
"""Values of 3, 5, 6 and 7 bits straddle words in no version before the first, in all from the second on; between them
releases differ from previews."""


class CompressedTensors(QuantScheme):
    """Weights as llm-compressor stores them, in the formats

    - pack-quantized: 2 to 8 bits in int32 words; a zero point packed along the outputs, or int8 (0.8);
      ``weight_g_idx`` of files made with actorder "group";
    - int-quantized: int8, with the scale of static activations beside it;
    - float-quantized: E4M3 with a scale a tensor, an output, a group or a block;
    - naive-quantized: the older name of the latter two without quantized activations.

    Scales are of the model's dtype. Which of the matrices that a group targets is quantized the file says: one with
    a plain weight and no scale is plain.

    Activations of ``float-quantized`` groups, static or dynamic, stay in the model's dtype, which is more exact than
    what the file was made for; so does the KV cache (kv_cache_scheme). Where a group says that activations are int8,
    kernels may round them with a scale a token, in place of a static one too.
    """

    quantizes_tables: ClassVar[bool] = True

    def __init__(
        self, groups: Sequence[Group], ignore: Targets, version: tuple[int, ...], view: CheckpointView
    ) -> None:
        self._groups, self._ignore, self._version, self._view = groups, ignore, version, view

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> CompressedTensors:
        """``config_groups``, ``format``, ``ignore``, ``version``; a group that matches nothing is refused."""
        groups, ignore = read_groups(config)
        modules = {
            name.rpartition(".")[0]
            for name in view.names()
            if name.endswith((".weight", ".weight_packed")) and len(view.info(name).shape) == 2
        }
        for group in groups:
            if modules and not any(group.targets.match(module, _kind(module)) for module in modules):
                raise wrong(
                    f"config_groups.{group.name}.targets",
                    "Linear, Embedding, or names or patterns of modules of the checkpoint",
                    config["config_groups"][group.name].get("targets"),
                )
        if config.get("kv_cache_scheme") is not None:
            LOG.info(
                "kv_cache_scheme of the checkpoint is not used: the KV cache has the engine's kv_cache_dtype"
            )
        return cls(groups, ignore, _version(config.get("version")), view)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        names = view.names()
        weight = f"{linear.name}.weight"
        dtype = view.info(weight).dtype if weight in names else None
        parts = [s for s in ("weight_packed", "weight_scale") if f"{linear.name}.{s}" in names]
        if dtype in PLAIN and not parts:
            return {}
        group = self._group(linear)
        if group is None:
            if dtype is not None or parts:
                raise CheckpointError(
                    f"{view.where(weight)}: {linear.name!r} should be plain, since quantization_config leaves it out, "
                    f"found {', '.join([*parts, *([f'a weight of {dtype}'] if dtype else [])])}; config.json and weights "
                    "are not of one checkpoint"
                )
            return {}
        return self._specs(group, linear, view)

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        group = self._group(linear)
        assert group is not None, "tensors() gave none"
        for suffix in ("weight_scale", "input_scale"):
            if suffix in tensors:
                self._check_scale(linear, suffix, tensors[suffix])
        if group.floats:
            return self._floats(group, linear, tensors)
        return self._integers(group, linear, tensors)

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        """Of a matrix with ``weight_g_idx``, which is read: it says how many inputs share a scale, and in what order."""
        specs = self.tensors(linear, view)
        name, expected = f"{linear.name}.weight_g_idx", specs.get("weight_g_idx")
        if expected is None or name not in view.names():
            return None
        info = view.info(name)
        if (info.shape, info.dtype) != (expected.shape, expected.dtype):
            return None
        tensors = {
            suffix: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            for suffix, spec in specs.items()
        }
        return self.to_form(linear, {**tensors, "weight_g_idx": view.read(name)})

    def _group(self, linear: LinearSpec) -> Group | None:
        """The group that ``linear`` is of; ``None``: it is left out."""
        kind = KINDS["embed.weight" in linear.parameters]
        if self._ignore.match(linear.name, kind):
            return None
        found = [group for group in self._groups if group.targets.match(linear.name, kind)]
        if len(found) > 1:
            expected = f"at most one group for {linear.name!r}"
            stated = wrong("config_groups", expected, ", ".join(group.name for group in found))
            raise CheckpointError(f"{self._view.where(f'{linear.name}.weight_scale')}: {stated}")
        return found[0] if found else None

    def _specs(self, group: Group, linear: LinearSpec, view: CheckpointView) -> dict[str, TensorSpec]:
        out, inputs = linear.out_features, linear.in_features
        rows, columns = group.scale_block(out, inputs)
        scale_shape = (1,) if group.strategy == "tensor" else (-(-out // rows), -(-inputs // columns))
        # The zero points' own layout is that of the weight, so it is asked first.
        padded = group.packed and self._is_padded(group, linear, view)
        zero = None if group.floats else self._zero_point(group, linear, scale_shape, padded, view)
        g_idx = group.act_order or _has(view, linear, "weight_g_idx")
        cut = _cut(group, linear, zero, grouped_by_index=g_idx)
        specs: dict[str, TensorSpec] = {}
        if group.packed:
            shape = (out, words(inputs, group.bits, padded=padded))
            pack = 32 // group.bits if cut == 1 else 1
            specs["weight_packed"] = TensorSpec(shape=shape, dtype="int32", shard_dim=cut, pack=pack)
            specs["weight_shape"] = self._shape(linear, view)
        else:
            dtype = "float8_e4m3fn" if group.floats else "int8"
            specs["weight"] = TensorSpec(shape=(out, inputs), dtype=dtype, shard_dim=cut)
        scale_cut = (
            cut if cut is not None and len(scale_shape) == 2 and (cut == 0 or columns < inputs) else None
        )
        shared = 1 if scale_cut is None else (rows, columns)[scale_cut]
        specs["weight_scale"] = TensorSpec(
            shape=_found_shape(view, linear, "weight_scale", scale_shape),
            dtype=_found_dtype(view, linear, "weight_scale", SCALES),
            shard_dim=scale_cut,
            group=shared,
        )
        if zero is not None:
            pack = 32 // group.bits if scale_cut == 0 and zero.dtype == "int32" else 1
            specs["weight_zero_point"] = TensorSpec(
                shape=zero.shape, dtype=zero.dtype, shard_dim=scale_cut, pack=pack, group=shared
            )
        if g_idx and not group.floats:
            specs["weight_g_idx"] = TensorSpec(shape=(inputs,), dtype="int32")
        if group.static:
            specs["input_scale"] = TensorSpec(
                shape=_found_shape(view, linear, "input_scale", (1,)),
                dtype=_found_dtype(view, linear, "input_scale", SCALES),
            )
        return specs

    def _is_padded(self, group: Group, linear: LinearSpec, view: CheckpointView) -> bool:
        """Whether words are padded: as their number says, or that of the zero points' words, or the version."""
        if 32 % group.bits == 0 or self._version < ALL_PADDED_BEFORE:
            return 32 % group.bits != 0
        widths = [("weight_packed", 1, linear.in_features), ("weight_zero_point", 0, linear.out_features)]
        for suffix, dimension, count in widths:
            old, new = words(count, group.bits, padded=True), words(count, group.bits, padded=False)
            name = f"{linear.name}.{suffix}"
            if old == new or name not in view.names() or view.info(name).dtype != "int32":
                continue
            shape = view.info(name).shape
            return len(shape) == 2 and shape[dimension] == old
        return self._version < STREAM_SINCE

    def _zero_point(
        self,
        group: Group,
        linear: LinearSpec,
        scale_shape: tuple[int, ...],
        padded: bool,
        view: CheckpointView,
    ) -> TensorSpec | None:
        """What zero points are stored as; a symmetric group's need not be there."""
        name = f"{linear.name}.weight_zero_point"
        if group.symmetric and name not in view.names():
            return None
        unpacked = name in view.names() and view.info(name).dtype == "int8"
        if not group.packed or len(scale_shape) == 1 or unpacked:
            return TensorSpec(
                shape=_found_shape(view, linear, "weight_zero_point", scale_shape), dtype="int8"
            )
        packed = words(linear.out_features, group.bits, padded=padded)
        return TensorSpec(shape=(packed, scale_shape[1]), dtype="int32")

    def _shape(self, linear: LinearSpec, view: CheckpointView) -> TensorSpec:
        """``weight_shape``, which must say what the model does: read here, where ``linear`` is still whole."""
        dtype = _found_dtype(view, linear, "weight_shape", ("int64", "int32"))
        name = f"{linear.name}.weight_shape"
        if name in view.names() and view.info(name).shape == (2,) and view.info(name).dtype == dtype:
            found, expected = view.read(name).tolist(), [linear.out_features, linear.in_features]
            if found != expected:
                raise self._damaged(linear, "weight_shape", f"{expected}, by config.json", str(found))
        return TensorSpec(shape=(2,), dtype=dtype)

    def _floats(self, group: Group, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Fp8:
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if group.strategy == "tensor":
            scales = scales.reshape(1, 1)
        form = Fp8.of_blocks(codes, scales, group.scale_block(linear.out_features, linear.in_features))
        # E4M3 has two NaN and no infinity; isnan() is a hundred times as slow.
        if not codes.is_meta and bool(codes.view(torch.uint8).bitwise_and(0x7F).eq_(0x7F).any()):
            raise self._damaged(linear, "weight", "finite numbers", "NaN (byte 0x7F or 0xFF)")
        return form

    def _integers(
        self, group: Group, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]
    ) -> ChannelInt8 | GroupedInt:
        out, inputs = linear.out_features, linear.in_features
        scales = tensors["weight_scale"]
        padded = group.packed and self._is_padded(group, linear, self._view)
        zeros = self._zeros(group, linear, tensors, padded)
        if group.strategy == "tensor":
            scales = scales.reshape(1, 1).expand(out, 1).contiguous()
        order, step, taken = self._order(group, linear, tensors.get("weight_g_idx"))
        if group.packed and group.bits == 4 and order is None and inputs % 2 == 0:
            # The file's bytes are the form's: code + 8, an even input in the low half.
            codes = in_bytes(tensors["weight_packed"])[:, : inputs // 2].contiguous()
            bits = 4
        else:
            shifted = self._shifted(group, linear, tensors, padded)
            if order is not None:
                shifted = shifted[:, order.to(shifted.device)]
            if group.symmetric and group.bits > 4 and scales.shape[1] == 1 and order is None:
                return ChannelInt8(
                    codes=(shifted ^ 0x80).view(torch.int8).contiguous(),
                    scales=scales.squeeze(1).float(),
                    activation="per-token" if group.activations == "int" else "none",
                )
            bits = 4 if group.bits <= 4 and inputs % 2 == 0 else 8
            codes = nibbles(shifted - 120) if bits == 4 else shifted.contiguous()
        if zeros is not None:
            zeros = zeros - 120 if bits == 4 else zeros
        if taken is not None:
            scales = scales[:, taken.to(scales.device)]
            zeros = None if zeros is None else zeros[:, taken.to(zeros.device)]
        return GroupedInt(
            codes=codes,
            scales=scales,
            group=step,
            bits=bits,
            zero=2 ** (bits - 1),
            zeros=zeros,
            activation="per-group" if bits == 4 else "none",
            permutation=None if order is None else order.to(device=codes.device, dtype=torch.int32),
        )

    def _shifted(
        self, group: Group, linear: LinearSpec, tensors: Mapping[str, torch.Tensor], padded: bool
    ) -> torch.Tensor:
        """Signed codes + 128: uint8 [out, in]."""
        half = 2 ** (group.bits - 1)
        if group.packed:
            codes = unpack(tensors["weight_packed"], linear.in_features, group.bits, padded=padded)
            return codes if half == 128 else codes + (128 - half)
        self._check_range(linear, "weight", tensors["weight"], half)
        return tensors["weight"].view(torch.uint8) ^ 0x80

    def _zeros(
        self, group: Group, linear: LinearSpec, tensors: Mapping[str, torch.Tensor], padded: bool
    ) -> torch.Tensor | None:
        """Zero points + 128: uint8 [out, groups]; ``None`` of a symmetric group, whose zero points must be 0."""
        stored = tensors.get("weight_zero_point")
        if stored is None:
            return None
        half = 2 ** (group.bits - 1)
        if stored.dtype == torch.int32:
            packed = unpack(stored.t(), linear.out_features, group.bits, padded=padded)
            zeros = (packed + (128 - half)).t().contiguous()
        else:
            self._check_range(linear, "weight_zero_point", stored, half)
            zeros = stored.contiguous().view(torch.uint8).bitwise_xor(0x80)
            if group.strategy == "tensor":
                zeros = zeros.reshape(1, 1).expand(linear.out_features, 1).contiguous()
        if group.symmetric and not zeros.is_meta and bool((zeros != 128).any()):
            expected = f"0 alone, since config group {group.name!r} is symmetric"
            raise self._damaged(linear, "weight_zero_point", expected, "others")
        return None if group.symmetric else zeros

    def _order(
        self, group: Group, linear: LinearSpec, g_idx: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, int, torch.Tensor | None]:
        """(order of the inputs in which groups lie together, or ``None``; inputs that share a scale in that order;
        column of the stored scales that each of those has, or ``None`` where it is its own)."""
        inputs = linear.in_features
        size = min(group.group_size, inputs) if group.strategy == "group" else inputs
        count = -(-inputs // size)
        if g_idx is None or bool((g_idx == -1).all()):  # -1: never set, hence in order
            step = math.gcd(size, inputs)
            return None, step, None if step == size else torch.arange(0, inputs, step, device="cpu") // size
        wrong_index = g_idx[(g_idx < 0) | (g_idx >= count)]
        if wrong_index.numel():
            raise self._damaged(linear, "weight_g_idx", f"groups 0 to {count - 1}", str(int(wrong_index[0])))
        ordered, order = g_idx.long().sort(stable=True)
        step = math.gcd(*ordered.unique_consecutive(return_counts=True)[1].tolist())
        in_order = torch.equal(ordered, g_idx.long())
        return None if in_order else order, step, ordered[::step]

    def _check_scale(self, linear: LinearSpec, suffix: str, scale: torch.Tensor) -> None:
        if scale.is_meta:
            return
        wrong_scale = scale[~(scale.isfinite() & (scale >= 0))]
        if wrong_scale.numel():
            raise self._damaged(linear, suffix, "finite scales of at least 0", f"{float(wrong_scale[0])}")

    def _check_range(self, linear: LinearSpec, suffix: str, codes: torch.Tensor, half: int) -> None:
        """int8 ``codes`` are of fewer bits than that."""
        if codes.is_meta or half == 128 or codes.numel() == 0:
            return
        low, high = (int(value) for value in codes.aminmax())
        if low < -half or high >= half:
            raise self._damaged(linear, suffix, f"{-half} to {half - 1}", f"{low} to {high}")

    def _damaged(self, linear: LinearSpec, suffix: str, expected: str, found: str) -> CheckpointError:
        name = f"{linear.name}.{suffix}"
        return CheckpointError(
            f"{self._view.where(name)}: tensor {name!r} should hold {expected}, found {found}; download the file again, "
            "or quantize the model anew"
        )


def _cut(group: Group, linear: LinearSpec, zero: TensorSpec | None, *, grouped_by_index: bool) -> int | None:
    """The dimension that ranks cut; ``None`` where words or blocks would not come apart between two ranks."""
    rows, columns = group.scale_block(linear.out_features, linear.in_features)
    straddles = group.packed and 32 % group.bits != 0
    in_word = 32 // group.bits
    if linear.cut == "outputs":
        packed_zeros = zero is not None and zero.dtype == "int32"
        if linear.out_features % rows or (packed_zeros and (straddles or linear.out_features % in_word)):
            return None
        return 0
    if grouped_by_index or straddles or linear.in_features % columns:
        return None
    return None if group.packed and linear.in_features % in_word else 1


def _has(view: CheckpointView, linear: LinearSpec, suffix: str) -> bool:
    return f"{linear.name}.{suffix}" in view.names()


def _kind(module: str) -> str:
    """Its class, by its name: what a checkpoint's token embedding is called in every family."""
    own = module.rpartition(".")[2]
    return KINDS["embed" in own or own == "wte"]


def _found_dtype(view: CheckpointView, linear: LinearSpec, suffix: str, known: Sequence[str]) -> str:
    """The dtype that the file has, where it is one of ``known``, else the first of these."""
    name = f"{linear.name}.{suffix}"
    found = view.info(name).dtype if name in view.names() else known[0]
    return found if found in known else known[0]


def _found_shape(
    view: CheckpointView, linear: LinearSpec, suffix: str, expected: tuple[int, ...]
) -> tuple[int, ...]:
    """``expected``, or () where a single number is stored so."""
    name = f"{linear.name}.{suffix}"
    return () if expected == (1,) and name in view.names() and view.info(name).shape == () else expected


def _version(stated: object) -> tuple[int, ...]:
    """ "0.17.1" -> (0, 17); without one a current version."""
    parts = str(stated).split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else STREAM_SINCE
