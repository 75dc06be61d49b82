"""Weights as the native kernels read them: panels of 32 outputs, packed where the weight lies if it is ours to write."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from kvpage.api.quant import ChannelInt8, Codebook, Dense, Fp8, GroupedInt, WeightForm
from kvpage_cpu.native import Context, chosen_isa
from kvpage_cpu.structs import BF16, C4, F8, F16, F32, I4, I8, I16, U8, KvpGroupNumbers, KvpLinear

PANEL = 32
ALIGNMENT = 64
PLAIN = {torch.float32: F32, torch.bfloat16: BF16}
NUMBERS = {**PLAIN, torch.float16: F16, torch.uint8: U8, torch.int8: I8, torch.int16: I16}
"""Types of groups' scales, zeros and offsets."""
MULTIPLES = {F32: 16, BF16: 32, I8: 64, F8: 64}
"""Inputs are padded to a multiple of this where they have no groups."""
GROUPS = (128, 64, 32, 16)
"""Inputs that share a scale in the panels: the largest that divides the form's group, scales repeated."""
Grouped = GroupedInt | Codebook | Fp8


@dataclass(slots=True)
class PackedLinear:
    """A linear layer of the native library, and the tensors that hold its memory."""

    struct: KvpLinear
    tensors: list[torch.Tensor] = field(default_factory=list)


def why_not(form: WeightForm) -> list[str]:
    """Reasons why the native kernels cannot compute ``form``; empty if they can. Looks at no tensor's values."""
    if isinstance(form, Dense):
        known = form.tensor.dtype in PLAIN and form.tensor.dim() == 2
        return [] if known else [f"plain weights of {form.tensor.dtype} (has float32, bfloat16)"]
    if isinstance(form, ChannelInt8):
        return []
    if not isinstance(form, Grouped):
        return [f"weights held as {type(form).__name__} (has Dense, ChannelInt8, GroupedInt, Codebook, Fp8)"]
    if form.group < form.shape[1] and form.group % GROUPS[-1]:
        return [f"groups of {form.group} (has multiples of {GROUPS[-1]}, and whole rows)"]
    return []


def context_for(forms: Iterable[WeightForm], dtype: str) -> Context:
    """A context of the chosen instruction set, or one that keeps x in float32 where the model is in float32.

    With BF16 instructions x becomes bfloat16 on its way to packed weights, which is not what a float32 model means by
    weights alone being quantized.
    """
    isa = chosen_isa()[0]
    exact = dtype == "float32" and any(not isinstance(form, Dense) for form in forms)
    return Context("avx512" if exact and isa == "avx512_bf16" else isa)


def merge(forms: Sequence[WeightForm]) -> WeightForm | None:
    """One form of the outputs of all; a copy only where they do not lie together. ``None``: they do not agree."""
    first, others = forms[0], forms[1:]
    if not others:
        return first
    joined = first.join(others)
    return first.join(others, _concatenated) if joined is None else joined


def _concatenated(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts))


def pack(
    context: Context,
    form: WeightForm,
    bias: torch.Tensor | None = None,
    *,
    exact: bool = False,
    in_place: bool = False,
) -> PackedLinear:
    """``form`` as a native linear layer; with ``in_place`` its memory is written over where its shape allows that.

    Args:
        exact: x is never rounded to int8, whatever ``form.activation`` allows.

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
    elif isinstance(form, ChannelInt8):
        plain, struct.type, struct.padded = form.codes, I8, _up(inputs, MULTIPLES[I8])
        struct.zero, struct.dynamic = 128, form.activation == "per-token" and not exact
        struct.output_scales = _keep(packed, _padded_rows(form.scales.float() * form.factor))
    else:
        assert isinstance(form, Grouped), "why_not has no reasons"
        plain = _describe_groups(packed, form, exact, in_place)
    if bias is not None:
        struct.bias = _keep(packed, bias.float().contiguous())
    plain = plain.contiguous()
    source_row_bytes = plain.shape[1] * plain.element_size()
    bits = 4 if struct.type in (I4, C4) else 8 * plain.element_size()
    row_bytes = struct.padded * bits // 8
    in_place = in_place and struct.padded == inputs and plain.data_ptr() % ALIGNMENT == 0
    whole, rest = divmod(outputs, PANEL)
    room = plain if in_place else _aligned(whole * PANEL * row_bytes)
    struct.panels = _keep(packed, room)
    if rest:
        struct.tail = _keep(packed, _aligned(PANEL * row_bytes))
    if context.library.kvp_pack(context.handle, ctypes.byref(struct), plain.data_ptr(), source_row_bytes):
        raise MemoryError(f"no memory to pack a weight of {outputs} x {inputs}")
    return packed


def _describe_groups(packed: PackedLinear, form: Grouped, exact: bool, in_place: bool) -> torch.Tensor:
    """Sets what the struct says of groups, and gives the codes."""
    struct, inputs = packed.struct, form.shape[1]
    if isinstance(form, Fp8):
        struct.type = F8
        if form.scales.shape[1] == 1:
            struct.padded = _up(inputs, MULTIPLES[F8])
            struct.output_scales = _keep(packed, _padded_rows(form.scales.flatten()))
            return form.codes
    whole_row = form.group >= inputs
    unit = next((size for size in GROUPS if (inputs if whole_row else form.group) % size == 0), 32)
    struct.group, struct.padded = unit, _up(inputs, unit)
    groups = struct.padded // unit
    repeat = groups if whole_row else form.group // unit

    def numbers(values: torch.Tensor | None, shared: torch.Tensor | None = None) -> KvpGroupNumbers:
        if values is None:
            return KvpGroupNumbers()
        own = in_place and repeat == 1
        panels = _group_panels(
            values if repeat == 1 else values.repeat_interleave(repeat, 1)[:, :groups], own
        )
        found = KvpGroupNumbers(values=_keep(packed, panels), type=NUMBERS[values.dtype])
        if shared is not None:
            found.shared = _keep(packed, _group_panels(shared, in_place))
            found.shared_type, found.per_shared = NUMBERS[shared.dtype], groups // shared.shape[1]
        return found

    if isinstance(form, GroupedInt):
        struct.type = I4 if form.bits == 4 else I8
        struct.dynamic = form.bits == 4 and unit >= 32 and form.activation == "per-group" and not exact
        struct.zero = form.zero
        struct.scales = numbers(form.scales, form.super_scales)
        struct.zeros = numbers(form.zeros)
        struct.offsets = numbers(form.offsets, form.super_offsets)
        if form.permutation is not None:
            struct.permutation = _keep(packed, form.permutation.contiguous())
    else:
        struct.scales = numbers(form.scales)
        if isinstance(form, Codebook):
            struct.type, struct.table = C4, _keep(packed, form.table.contiguous())
    return form.codes


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


def _group_panels(values: torch.Tensor, in_place: bool) -> torch.Tensor:
    """[N, groups] -> [panels, groups, 32]; ``in_place``: in the memory of ``values`` where they fill whole panels."""
    panels = _padded_rows(values).view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()
    fits = values.is_contiguous() and panels.numel() == values.numel()
    if not in_place or not fits or panels.data_ptr() == values.data_ptr():
        return panels
    return values.view(panels.shape).copy_(panels)
