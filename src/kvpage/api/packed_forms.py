"""Forms whose weights share scales: integers in groups, a table of values in groups, 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpage.api.forms import PackedForm

if TYPE_CHECKING:
    import torch

FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupedInt(PackedForm):
    """weight[o, i] = (q[o, i] - zero) * scale[o, i // group] + offset[o, i // group], q of 0 to 2**bits - 1.

    Scales and offsets are numbers, or small integers that share a number (GGUF's K-quants): then scale[o, g] is
    super_scales[o, g // n] * scales[o, g], n groups to a super-scale, and offset likewise. All products are in
    float32, in the order that is written here.

    Attributes:
        bits: 4 or 8. group: inputs that share a scale; it divides the inputs.
        codes: uint8, contiguous: of 8 bits [out, in]; of 4 bits [out, in / 2], an even input in the low half of a
            byte and the odd one after it in the high half.
        scales: bfloat16, float16 or float32 [out, in / group], uint8 or int8 where there are super_scales; a scale
            may be negative.
        zero: the code that stands for 0 (before ``offsets``); half the codes is symmetric.
        zeros: such a code for each group instead, uint8 or int16 [out, in / group]; it may be 2**bits.
        offsets: of the dtypes of scales, [out, in / group]; ``None`` = 0. Not beside ``zeros``.
        super_scales, super_offsets: bfloat16, float16 or float32 [out, in / group / n].
        permutation: int32 [in]: column j of the codes is input permutation[j]; ``None`` = j.
        activation: "none": x stays as it is; "per-group": a kernel may round x to int8, one scale a row and group,
            where the model's dtype is of 16 bits. In float32 no kernel rounds x.

    Raises:
        ValueError: tensors that do not fit each other.
    """

    by_output: ClassVar[tuple[str, ...]] = (
        "codes", "scales", "zeros", "offsets", "super_scales", "super_offsets",
    )  # fmt: skip
    shared: ClassVar[tuple[str, ...]] = ("permutation",)

    codes: torch.Tensor
    scales: torch.Tensor
    group: int
    bits: int = 4
    zero: int = 8
    offsets: torch.Tensor | None = None
    activation: Literal["none", "per-group"] = "none"
    zeros: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_offsets: torch.Tensor | None = None
    permutation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or not 0 <= self.zero < 2**self.bits:
            raise ValueError(
                f"{self.bits} bits with zero {self.zero}; bits are 4 or 8, zero is a code of theirs"
            )
        if self.codes.dim() != 2 or _dtype(self.codes) != "uint8":
            raise ValueError(f"codes must be uint8 of two dimensions, got {_described(self.codes)}")
        inputs = self.shape[1]
        if self.group < 1 or inputs % self.group:
            raise ValueError(f"groups of {self.group} do not divide {inputs} inputs")
        if self.zeros is not None and self.offsets is not None:
            raise ValueError("zeros and offsets are both given; a zero z is an offset of -z * scale")
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """What does not fit: of one tensor after another."""
        rows, inputs = self.shape
        groups = inputs // self.group
        integers = ("uint8", "int8")
        scales = integers if self.super_scales is not None else FLOATS
        offsets = integers if self.super_offsets is not None else FLOATS
        yield from _unfit("scales", self.scales, (rows, groups), scales)
        yield from _unfit("offsets", self.offsets, (rows, groups), offsets)
        yield from _unfit("zeros", self.zeros, (rows, groups), ("uint8", "int16"))
        yield from _unfit("permutation", self.permutation, (inputs,), ("int32",))
        for name in ("super_scales", "super_offsets"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            count = tensor.shape[1] if tensor.dim() == 2 and tensor.shape[1] else 0
            if count == 0 or groups % count:
                yield f"{name} must share {groups} groups evenly, got {_described(tensor)}"
            yield from _unfit(name, tensor, (rows, count), FLOATS)
        if self.super_offsets is not None and self.offsets is None:
            yield "super_offsets without offsets"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), of the codes and bits."""
        rows, stored = self.codes.shape
        return (rows, stored * 8 // self.bits)

    @property
    def kind(self) -> tuple[object, ...]:
        """Bits, group, zero and activation."""
        return (self.bits, self.group, self.zero, self.activation)

    def group_scales(self) -> torch.Tensor:
        """float32 [out, in / group], super-scales included; a new tensor or the scales themselves."""
        return _scaled(self.scales, self.super_scales)

    def group_offsets(self) -> torch.Tensor | None:
        """float32 [out, in / group] of ``offsets``, super-offsets included."""
        return None if self.offsets is None else _scaled(self.offsets, self.super_offsets)

    def dequantize(self) -> torch.Tensor:
        """((q - zero) * scale) + offset in float32, inputs in their own order."""
        rows, inputs = self.shape
        scales, offsets = self.group_scales(), self.group_offsets()
        values = scales.new_empty((rows, inputs))
        if self.bits == 8:
            values.copy_(self.codes)
        else:
            values[:, 0::2] = self.codes & 15
            values[:, 1::2] = self.codes >> 4
        groups = values.view(rows, inputs // self.group, self.group)
        groups.sub_(self.zero if self.zeros is None else self.zeros.float().unsqueeze(2))
        groups.mul_(scales.unsqueeze(2))
        if offsets is not None:
            groups.add_(offsets.unsqueeze(2))
        if self.permutation is None:
            return values
        return values.new_empty(values.shape).index_copy_(1, self.permutation.long(), values)

    def inputs(self, start: int, stop: int) -> GroupedInt | None:
        """Whole groups (and super-groups) only; ``None`` with a permutation."""
        group, groups = self.group, self.shape[1] // self.group
        if self.permutation is not None or start % group or stop % group:
            return None
        cut = {"codes": self.codes[:, start * self.bits // 8 : stop * self.bits // 8]}
        first, last = start // group, stop // group
        for name in ("scales", "zeros", "offsets"):
            tensor = getattr(self, name)
            if tensor is not None:
                cut[name] = tensor[:, first:last]
        for name in ("super_scales", "super_offsets"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            of_super = groups // tensor.shape[1]
            if first % of_super or last % of_super:
                return None
            cut[name] = tensor[:, first // of_super : last // of_super]
        return replace(self, **{name: tensor.contiguous() for name, tensor in cut.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Codebook(PackedForm):
    """weight[o, i] = table[q[o, i]] * scales[o, i // group]: 4-bit floats (NF4, FP4: QLoRA, arXiv:2305.14314).

    Attributes:
        codes: uint8 [out, in / 2], contiguous, an even input in the low half of a byte.
        scales: bfloat16, float16 or float32 [out, in / group]. group: it divides the inputs.
        table: float32 [16].

    Raises:
        ValueError: tensors that do not fit each other.
    """

    by_output: ClassVar[tuple[str, ...]] = ("codes", "scales")
    shared: ClassVar[tuple[str, ...]] = ("table",)

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    group: int

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or _dtype(self.codes) != "uint8":
            raise ValueError(f"codes must be uint8 of two dimensions, got {_described(self.codes)}")
        rows, inputs = self.shape
        if self.group < 1 or inputs % self.group:
            raise ValueError(f"groups of {self.group} do not divide {inputs} inputs")
        for problem in _unfit("scales", self.scales, (rows, inputs // self.group), FLOATS):
            raise ValueError(problem)
        for problem in _unfit("table", self.table, (16,), ("float32",)):
            raise ValueError(problem)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), of the codes."""
        rows, stored = self.codes.shape
        return (rows, stored * 2)

    @property
    def kind(self) -> tuple[object, ...]:
        """The group."""
        return (self.group,)

    def dequantize(self) -> torch.Tensor:
        """table[q] * scale in float32."""
        rows, inputs = self.shape
        values = self.table.new_empty((rows, inputs))
        values[:, 0::2] = self.table[(self.codes & 15).int()]
        values[:, 1::2] = self.table[(self.codes >> 4).int()]
        values.view(rows, inputs // self.group, self.group).mul_(self.scales.float().unsqueeze(2))
        return values

    def inputs(self, start: int, stop: int) -> Codebook | None:
        """Whole groups and bytes only."""
        if start % self.group or stop % self.group or start % 2 or stop % 2:
            return None
        return replace(
            self,
            codes=self.codes[:, start // 2 : stop // 2].contiguous(),
            scales=self.scales[:, start // self.group : stop // self.group].contiguous(),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fp8(PackedForm):
    """weight[o, i] = codes[o, i] * scales[o, i // group] (OCP 8-bit floating point, E4M3).

    Attributes:
        codes: float8_e4m3fn [out, in], contiguous.
        scales: float32 [out, ceil(in / group)]; the last group may be short. One scale a tensor or a block of
            outputs is repeated for each output.
        group: inputs that share a scale: a block's width, or all inputs.

    Raises:
        ValueError: tensors that do not fit each other.
    """

    by_output: ClassVar[tuple[str, ...]] = ("codes", "scales")

    codes: torch.Tensor
    scales: torch.Tensor
    group: int

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or _dtype(self.codes) != "float8_e4m3fn":
            raise ValueError(f"codes must be float8_e4m3fn of two dimensions, got {_described(self.codes)}")
        rows, inputs = self.shape
        if self.group < 1:
            raise ValueError(f"groups of {self.group} inputs; at least 1")
        for problem in _unfit("scales", self.scales, (rows, -(-inputs // self.group)), ("float32",)):
            raise ValueError(problem)

    @classmethod
    def of_blocks(cls, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> Fp8:
        """The form of ``codes`` [out, in] with a scale for each block of so many outputs and inputs.

        Args:
            scales: of any floating dtype, [ceil(out / block[0]), ceil(in / block[1])]; the last blocks may be cut
                off. A scale a tensor is one block, a scale an output is a block of one output and all inputs.

        Raises:
            ValueError: tensors that do not fit each other.
        """
        rows, inputs = codes.shape
        # No more rows than there are outputs: a block's size is only a number in a config.
        spread = scales.float().repeat_interleave(min(block[0], max(rows, 1)), 0)[:rows]
        return cls(codes=codes, scales=spread.contiguous(), group=min(block[1], max(inputs, 1)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), of the codes."""
        return tuple(self.codes.shape)

    @property
    def kind(self) -> tuple[object, ...]:
        """The group."""
        return (self.group,)

    def dequantize(self) -> torch.Tensor:
        """codes * scales in float32."""
        inputs = self.shape[1]
        values = self.codes.float()
        if self.scales.shape[1] == 1:
            return values.mul_(self.scales)
        return values.mul_(self.scales.repeat_interleave(self.group, 1)[:, :inputs])

    def inputs(self, start: int, stop: int) -> Fp8 | None:
        """Whole groups only, but with one scale an output."""
        if self.scales.shape[1] == 1:
            return replace(self, codes=self.codes[:, start:stop].contiguous(), group=stop - start)
        if start % self.group or (stop % self.group and stop != self.shape[1]):
            return None
        last = -(-stop // self.group)
        return replace(
            self,
            codes=self.codes[:, start:stop].contiguous(),
            scales=self.scales[:, start // self.group : last].contiguous(),
        )


def _scaled(values: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """[out, groups] times what n groups share [out, groups / n], in float32."""
    if shared is None:
        return values.float()
    rows, count = shared.shape
    return (shared.float().unsqueeze(2) * values.float().view(rows, count, values.shape[1] // count)).view(
        values.shape
    )


def _unfit(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> Iterator[str]:
    if tensor is not None and (tuple(tensor.shape) != shape or _dtype(tensor) not in dtypes):
        yield f"{name} must be {', '.join(dtypes)} of shape {list(shape)}, got {_described(tensor)}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
