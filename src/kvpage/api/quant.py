"""Weights: what a checkpoint reader, a quantization format and a linear kernel promise each other.

Formats and kernels stay apart: a format turns a checkpoint's tensors into a ``WeightForm`` and never knows the
device; a kernel computes a form and never knows the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A tensor as a header states it: ``shape``, and ``dtype`` as torch names it ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str


class CheckpointView(Protocol):
    """What a reader makes of a path or an object: tensors by the checkpoint's own names.

    Attributes:
        shared: ``True`` where ``read`` gives tensors that a living model also uses: they are taken as they
            are where dtype and device agree, never merged and never written.
    """

    shared: bool

    def names(self) -> Collection[str]:
        """Every tensor's name."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without touching the data."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; it may be a view of the file and must not be written."""
        ...

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows [start, stop), in consecutive pieces; each is valid until the next is taken.

        Rows are counted along all dimensions but the last: expert e of a tensor [experts, out, in] has the rows
        e * out to (e + 1) * out. A tensor of one dimension has its elements as rows.
        """
        ...

    def where(self, name: str) -> str:
        """The file (or object) that holds ``name``, for error messages."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor that a format stores for a linear layer.

    Attributes:
        shape: expected shape. dtype: torch dtype name.
        shard_dim: dimension that tensor parallelism cuts, ``None`` = every rank takes it whole.
        pack: logical elements in one stored element along the packed dimension.
        group: logical elements that share one entry of this tensor (scales), 1 = none.
    """

    shape: tuple[int, ...]
    dtype: str
    shard_dim: int | None = None
    pack: int = 1
    group: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """One matrix as the checkpoint stores it, which may hold several of kvpage's parameters (a fused q, k, v).

    Attributes:
        name: the module's name in the checkpoint ("model.layers.0.self_attn.q_proj"); tensors are ``name.suffix``.
        parameters: kvpage's names of the parameters it holds ("layers.0.attention.q.weight").
        in_features, out_features: its whole size.
    """

    name: str
    parameters: tuple[str, ...]
    in_features: int
    out_features: int

    @property
    def cut(self) -> Literal["outputs", "inputs"]:
        """What tensor parallelism divides among the ranks: the inputs of what projects back to the hidden size
        (attention's out, an MLP's down), else the outputs. ``TensorSpec.shard_dim`` is the dimension of that."""
        return "inputs" if self.parameters[0].endswith((".out.weight", ".down.weight")) else "outputs"


class WeightForm(ABC):
    """How a weight [out, in] is held in memory: dense, or one of the quantized forms."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape: (out, in) of a linear layer."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The exact float32 values this form stands for, of ``shape``; a new tensor."""

    @abstractmethod
    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> WeightForm:
        """The same form with each of its tensors replaced by ``change(tensor)``: to move or to re-house it."""

    @abstractmethod
    def take(self, rows: torch.Tensor) -> WeightForm:
        """The outputs ``rows`` (int64 [n]) of this form, as a form of its own kind."""

    def join(self, others: Sequence[WeightForm]) -> WeightForm | None:
        """The form of this one's outputs and then those of ``others``, which share its input, without a copy.

        ``None``: they differ in more than their tensors, or do not lie in one (``adjacent``). The loader puts the
        parts of q, k and v (gate and up) one after another wherever a tensor has one entry an output: a form
        that joins such parts is computed as one product.
        """
        return None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor it holds."""
        found: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True, slots=True, eq=False)
class Dense(WeightForm):
    """Plain numbers of the model's dtype, in any strides: [out, in] of a linear layer, or any other parameter.

    Parts of one merged tensor (q, k, v; gate, up) are views whose rows follow each other in one storage.
    """

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def dequantize(self) -> torch.Tensor:
        return self.tensor.float().clone()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Dense:
        return Dense(change(self.tensor))

    def take(self, rows: torch.Tensor) -> Dense:
        return Dense(self.tensor[rows])

    def join(self, others: Sequence[WeightForm]) -> Dense | None:
        tensors = [form.tensor for form in (self, *others) if isinstance(form, Dense)]
        whole = adjacent(tensors) if len(tensors) == 1 + len(others) else None
        return None if whole is None else Dense(whole)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelInt8(WeightForm):
    """weight[o, i] = codes[o, i] * scales[o]: one scale an output (LLM.int8(), arXiv:2208.07339, without outliers).

    Attributes:
        codes: int8 [out, in], contiguous. scales: float32 [out].
        activation: "none": x stays as it is; "per-token": the format was made for int8 x, one scale a row, and a
            kernel may compute so.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    activation: Literal["none", "per-token"] = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> torch.Tensor:
        return self.codes.float().mul_(self.scales.unsqueeze(1))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ChannelInt8:
        return replace(self, codes=change(self.codes), scales=change(self.scales))

    def take(self, rows: torch.Tensor) -> ChannelInt8:
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])

    def join(self, others: Sequence[WeightForm]) -> ChannelInt8 | None:
        parts = [form for form in (self, *others) if isinstance(form, ChannelInt8)]
        if len(parts) != 1 + len(others) or any(part.activation != self.activation for part in parts):
            return None
        codes = adjacent([part.codes for part in parts])
        scales = adjacent([part.scales for part in parts])
        return None if codes is None or scales is None else replace(self, codes=codes, scales=scales)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupedInt(WeightForm):
    """weight[o, i] = (q[o, i] - zero) * scales[o, i // group] + offsets[o, i // group], q of 0 to 2**bits - 1.

    Attributes:
        bits: 4 or 8. group: inputs that share a scale; it divides the inputs.
        codes: uint8, contiguous: of 8 bits [out, in]; of 4 bits [out, in / 2], an even input in the low half of a
            byte and the odd one after it in the high half.
        scales: bfloat16, float16 or float32 [out, in / group]; a scale may be negative.
        zero: the code that stands for 0 (before ``offsets``); half the codes is symmetric.
        offsets: of those dtypes, [out, in / group]; ``None`` = 0. A format with a zero point z a group has
            scales * (zero - z).
        activation: "none": x stays as it is; "per-group": the format was made for int8 x, one scale a row and group,
            and a kernel may compute so.

    Raises:
        ValueError: tensors that do not fit each other.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group: int
    bits: int = 4
    zero: int = 8
    offsets: torch.Tensor | None = None
    activation: Literal["none", "per-group"] = "none"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or not 0 <= self.zero < 2**self.bits:
            raise ValueError(
                f"{self.bits} bits with zero {self.zero}; bits are 4 or 8, zero is a code of theirs"
            )
        if self.codes.dim() != 2 or str(self.codes.dtype) != "torch.uint8":
            raise ValueError(f"codes must be uint8 of two dimensions, got {_described(self.codes)}")
        rows, inputs = self.shape
        if self.group < 1 or inputs % self.group:
            raise ValueError(f"groups of {self.group} do not divide {inputs} inputs")
        expected = (rows, inputs // self.group)
        for name, tensor in (("scales", self.scales), ("offsets", self.offsets)):
            if tensor is None:
                continue
            if tuple(tensor.shape) != expected or str(tensor.dtype) not in _SCALE_DTYPES:
                raise ValueError(
                    f"{name} must be {', '.join(_SCALE_DTYPES)} of shape {list(expected)}, got {_described(tensor)}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        rows, stored = self.codes.shape
        return (rows, stored * 8 // self.bits)

    def dequantize(self) -> torch.Tensor:
        rows, inputs = self.shape
        scales = self.scales.float()
        values = scales.new_empty((rows, inputs))
        if self.bits == 8:
            values.copy_(self.codes)
        else:
            values[:, 0::2] = self.codes & 15
            values[:, 1::2] = self.codes >> 4
        groups = values.view(rows, inputs // self.group, self.group)
        groups.sub_(self.zero).mul_(scales.unsqueeze(2))
        if self.offsets is not None:
            groups.add_(self.offsets.float().unsqueeze(2))
        return values

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GroupedInt:
        return replace(
            self,
            codes=change(self.codes),
            scales=change(self.scales),
            offsets=None if self.offsets is None else change(self.offsets),
        )

    def take(self, rows: torch.Tensor) -> GroupedInt:
        return self.map(lambda tensor: tensor[rows])

    def join(self, others: Sequence[WeightForm]) -> GroupedInt | None:
        parts = [form for form in (self, *others) if isinstance(form, GroupedInt)]
        if len(parts) != 1 + len(others) or any(part._kind != self._kind for part in parts):
            return None
        codes = adjacent([part.codes for part in parts])
        scales = adjacent([part.scales for part in parts])
        given = [part.offsets for part in parts if part.offsets is not None]
        offsets = adjacent(given) if given else None
        if codes is None or scales is None or (given and offsets is None):
            return None
        return replace(self, codes=codes, scales=scales, offsets=offsets)

    @property
    def _kind(self) -> tuple[object, ...]:
        """What forms agree in that are one matrix."""
        return (self.bits, self.group, self.zero, self.activation, self.offsets is None)


_SCALE_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def adjacent(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor whose dimension 0 is ``parts`` one after another, if they lie so in one storage."""
    first = parts[0]
    storage, strides, step = first.untyped_storage().data_ptr(), first.stride(), first.stride(0)
    expected = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.dtype != first.dtype:
            return None
        if part.stride() != strides or part.storage_offset() != expected or part.shape[1:] != first.shape[1:]:
            return None
        expected += part.shape[0] * step
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, strides, first.storage_offset())


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearEnv:
    """Where a linear layer runs: torch device type and dtype name of its activations."""

    device: str
    dtype: str


class LinearKernel(ABC):
    """A way to compute one form on a device; one object serves one weight.

    Once prepared it is given one row of zeros. One that raises on the way, or answers in another shape or dtype, is
    passed over with a warning for the next kernel that supports the form.
    """

    name: ClassVar[str]

    def __init__(self, env: LinearEnv) -> None:
        self.env = env

    @classmethod
    @abstractmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        """Reasons why this kernel cannot compute ``form`` there; empty if it can."""

    @abstractmethod
    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        """Called once before any ``forward``; packs where the kernel wants another layout. bias [out]."""

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out] of x's dtype; T may be 0 and x may be a strided view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRefusal:
    """A kernel that does not compute a weight, and why; ``broken``: it failed, where others decline."""

    kernel: type[LinearKernel]
    reasons: tuple[str, ...]
    broken: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearChoice:
    """Which kernel computes a weight.

    Attributes:
        weight: its name, several where they are one product ("layers.0.attention.q, k, v").
        form: the name of its form's class. kernel: ``None`` where none computes it.
        refused: those that were asked before.
    """

    weight: str
    form: str
    kernel: type[LinearKernel] | None
    refused: tuple[LinearRefusal, ...] = ()


class QuantScheme(ABC):
    """A checkpoint format for linear weights (GPTQ, AWQ, ...), or a way to quantize plain ones while they load."""

    quantizes_plain: ClassVar[bool] = False
    """``True``: it reads no format of its own. Each plain weight is given to ``to_form`` as {"weight": [out, in]}
    of the checkpoint's dtype, whatever way the checkpoint stores it, and ``config`` is the engine's
    ``quantization_config``, empty unless given."""

    quantizes_tables: ClassVar[bool] = False
    """``True``, of one that quantizes plain weights: ``tensors`` is also asked about the token embedding
    ("embed.weight", [vocab, hidden]). A tied output head is computed from that very form."""

    row_by_row: ClassVar[bool] = False
    """``True``, of one that quantizes plain weights: an output's codes depend on its own weights only. ``to_form``
    is then given a few outputs at a time, straight from the file, in a ``LinearSpec`` of that many, and all tensors
    of its forms have one entry an output: the plain weight never exists as a whole."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> QuantScheme:
        """Read ``config`` (the checkpoint's ``quantization_config``).

        Raises:
            kvpage.errors.CheckpointError: a value this format does not know.
        """

    @abstractmethod
    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        """The tensors that hold ``linear``: suffix of the name in the checkpoint ("qweight") -> what it must be.

        Empty: this matrix is stored plain (the head, a router, a module the format leaves out).
        """

    @abstractmethod
    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        """The form those tensors stand for, of shape (out, in); ``tensors`` has the keys that ``tensors()`` gave.

        They may be views of the file: the form must hold none of them as they are unless ``map`` may replace it.
        """
