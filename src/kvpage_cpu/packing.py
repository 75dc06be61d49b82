"""Weights as the native kernels read them: panels of 32 outputs, packed where the weight lies if it is ours to write."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from kvpage.api.quant import ChannelInt8, Dense, GroupedInt, WeightForm
from kvpage_cpu.native import Context, chosen_isa
from kvpage_cpu.structs import BF16, F32, I4, I8, KvpLinear

PANEL = 32
ALIGNMENT = 64
PLAIN = {torch.float32: F32, torch.bfloat16: BF16}
MULTIPLES = {F32: 16, BF16: 32, I8: 64}
"""Inputs are padded to a multiple of this (int4: of its group)."""
GROUPS = (32, 64, 128)


@dataclass(slots=True)
class PackedLinear:
    """A linear layer of the native library, and the tensors that hold its memory."""

    struct: KvpLinear
    tensors: list[torch.Tensor] = field(default_factory=list)


def why_not(form: WeightForm) -> list[str]:
    """Reasons why the native kernels cannot compute ``form``; empty if they can."""
    if isinstance(form, Dense):
        known = form.tensor.dtype in PLAIN and form.tensor.dim() == 2
        return [] if known else [f"plain weights of {form.tensor.dtype} (has float32, bfloat16)"]
    if isinstance(form, ChannelInt8):
        return []
    if not isinstance(form, GroupedInt):
        return [f"weights held as {type(form).__name__} (has Dense, ChannelInt8, GroupedInt)"]
    reasons = []
    if form.bits != 4 or form.zero != 8:
        reasons.append(f"{form.bits} bits with zero {form.zero} (has 4 bits with zero 8)")
    if form.group not in GROUPS:
        reasons.append(f"groups of {form.group} (has {', '.join(map(str, GROUPS))})")
    if not all(_is_bfloat16(tensor) for tensor in (form.scales, form.offsets) if tensor is not None):
        reasons.append("scales or offsets that bfloat16 cannot hold")
    return reasons


def context_for(forms: Iterable[WeightForm], dtype: str) -> Context:
    """A context of the chosen instruction set, or one that keeps x in float32 where the forms ask for that.

    With BF16 instructions x becomes bfloat16 on its way to integer weights, which is not what a float32 model means by
    weights alone being quantized.
    """
    isa = chosen_isa()[0]
    exact = dtype == "float32" and any(
        isinstance(form, (ChannelInt8, GroupedInt)) and form.activation == "none" for form in forms
    )
    return Context("avx512" if exact and isa == "avx512_bf16" else isa)


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 or bool((tensor.bfloat16() == tensor).all())


def merge(forms: Sequence[WeightForm]) -> WeightForm | None:
    """One form of the outputs of all; a copy only where they do not lie together. ``None``: they do not agree."""
    first = forms[0]
    joined = first if len(forms) == 1 else first.join(forms[1:])
    if joined is not None:
        return joined
    if isinstance(first, Dense):
        plain = [
            form.tensor
            for form in forms
            if isinstance(form, Dense) and form.tensor.dtype == first.tensor.dtype
        ]
        return Dense(torch.cat(plain)) if len(plain) == len(forms) else None
    if isinstance(first, ChannelInt8):
        codes = [
            form for form in forms if isinstance(form, ChannelInt8) and form.activation == first.activation
        ]
        if len(codes) == len(forms):
            return replace(
                first, codes=torch.cat([f.codes for f in codes]), scales=torch.cat([f.scales for f in codes])
            )
    return _merge_grouped(first, forms) if isinstance(first, GroupedInt) else None


def _merge_grouped(first: GroupedInt, forms: Sequence[WeightForm]) -> GroupedInt | None:
    kind = (first.bits, first.group, first.zero, first.activation, first.offsets is None)
    alike = [
        form
        for form in forms
        if isinstance(form, GroupedInt)
        and (form.bits, form.group, form.zero, form.activation, form.offsets is None) == kind
    ]
    if len(alike) != len(forms):
        return None
    offsets = [form.offsets for form in alike if form.offsets is not None]
    return replace(
        first,
        codes=torch.cat([form.codes for form in alike]),
        scales=torch.cat([form.scales for form in alike]),
        offsets=torch.cat(offsets) if offsets else None,
    )


def pack(
    context: Context, form: WeightForm, bias: torch.Tensor | None = None, *, in_place: bool = False
) -> PackedLinear:
    """``form`` as a native linear layer; with ``in_place`` its memory is written over where its shape allows that.

    Raises:
        MemoryError: the native library has no memory. ValueError: ``why_not(form)`` has reasons.
    """
    reasons = why_not(form)
    if reasons:
        raise ValueError("; ".join(reasons))
    outputs, inputs = form.shape
    packed = PackedLinear(KvpLinear(outputs=outputs, inputs=inputs))
    struct = packed.struct
    if isinstance(form, Dense):
        plain, struct.type = form.tensor, PLAIN[form.tensor.dtype]
        struct.padded = _up(inputs, MULTIPLES[struct.type])
        element_bits = 8 * plain.element_size()
    elif isinstance(form, ChannelInt8):
        plain, struct.type = form.codes, I8
        struct.dynamic = form.activation == "per-token"
        struct.padded, element_bits = _up(inputs, MULTIPLES[I8]), 8
        struct.scales = _keep(packed, _padded_rows(form.scales.float()))
    else:
        assert isinstance(form, GroupedInt), "why_not has no reasons"
        plain, struct.type, struct.group = form.codes, I4, form.group
        struct.dynamic = form.activation == "per-group"
        struct.padded, element_bits = inputs, 4
        struct.scales = _keep(packed, _scale_panels(form.scales))
        if form.offsets is not None:
            struct.offsets = _keep(packed, _scale_panels(form.offsets))
    if bias is not None:
        struct.bias = _keep(packed, bias.float().contiguous())
    plain = plain.contiguous()
    row_bytes = struct.padded * element_bits // 8
    in_place = in_place and struct.padded == inputs and plain.data_ptr() % ALIGNMENT == 0
    whole, rest = divmod(outputs, PANEL)
    room = plain if in_place else _aligned(whole * PANEL * row_bytes)
    struct.panels = _keep(packed, room)
    if rest:
        struct.tail = _keep(packed, _aligned(PANEL * row_bytes))
    source_row_bytes = inputs * element_bits // 8
    if context.library.kvp_pack(context.handle, ctypes.byref(struct), plain.data_ptr(), source_row_bytes):
        raise MemoryError(f"no memory to pack a weight of {outputs} x {inputs}")
    return packed


def _keep(packed: PackedLinear, tensor: torch.Tensor) -> int:
    packed.tensors.append(tensor)
    return tensor.data_ptr()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _aligned(size: int) -> torch.Tensor:
    """``size`` bytes that begin at a multiple of ``ALIGNMENT``; torch aligns its own allocations so."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _padded_rows(values: torch.Tensor) -> torch.Tensor:
    """[N, ..] with zeros up to a multiple of ``PANEL`` rows."""
    missing = -len(values) % PANEL
    return (
        torch.cat((values, values.new_zeros((missing, *values.shape[1:]))))
        if missing
        else values.contiguous()
    )


def _scale_panels(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> bfloat16 [panels, groups, 32]."""
    padded = _padded_rows(values.bfloat16())
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()
