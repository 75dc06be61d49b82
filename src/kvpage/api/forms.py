"""How a weight is held in memory: what every form promises, plain numbers, and int8 with a scale an output.

Forms of groups and of tables are in ``packed_forms``. All are found in ``kvpage.api.quant``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Lay: TypeAlias = Callable[[Sequence["torch.Tensor"]], "torch.Tensor | None"]


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

    def outputs(self, start: int, stop: int) -> WeightForm | None:
        """The outputs [start, stop) without a copy: a tensor-parallel rank's share, a part of a merged product.

        ``None``: ``take`` gives them.
        """
        return None

    def inputs(self, start: int, stop: int) -> WeightForm | None:
        """The inputs [start, stop) as a form of its own kind, exactly; ``None``: its blocks do not divide there."""
        return None

    def join(self, others: Sequence[WeightForm], lay: Lay | None = None) -> WeightForm | None:
        """The form of this one's outputs and then those of ``others``, which share its input.

        Args:
            lay: makes one tensor of parts along dimension 0, or ``None``; by default ``adjacent``, which copies
                nothing (``torch.cat`` does). The loader puts the parts of q, k and v (gate and up) one after
                another wherever a tensor has one entry an output.

        ``None``: they differ in more than their tensors, or ``lay`` gives none. A form that joins such parts is
        computed as one product.
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


class PackedForm(WeightForm):
    """What forms share that are dataclasses of tensors: which of these have one entry an output, which serve all."""

    by_output: ClassVar[tuple[str, ...]]
    """Fields whose dimension 0 is the outputs; one may be ``None``."""

    shared: ClassVar[tuple[str, ...]] = ()
    """Fields that all outputs use; one may be ``None``."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What forms agree in that can be one matrix, besides their type, tensors' dtypes and shared tensors."""
        return ()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Fields that are ``None`` stay so."""
        return self._with({name: change(tensor) for name, tensor in self._held(self.by_output + self.shared)})

    def take(self, rows: torch.Tensor) -> Self:
        """Copies of those outputs; shared tensors are the same objects."""
        return self._with({name: tensor[rows] for name, tensor in self._held(self.by_output)})

    def outputs(self, start: int, stop: int) -> Self:
        """Views of its tensors."""
        return self._with({name: tensor[start:stop] for name, tensor in self._held(self.by_output)})

    def join(self, others: Sequence[WeightForm], lay: Lay | None = None) -> Self | None:
        """As ``WeightForm.join``: forms of one class, ``kind`` and set of tensors, their shared tensors equal."""
        lay = lay or adjacent
        parts = [self]
        for form in others:
            if not isinstance(form, type(self)) or form.kind != self.kind or not self._same_shared(form):
                return None
            parts.append(form)
        joined: dict[str, torch.Tensor] = {}
        for name, _ in self._held(self.by_output):
            tensors = [getattr(part, name) for part in parts]
            alike = all(t is not None and t.dtype == tensors[0].dtype for t in tensors)
            whole = lay(tensors) if alike else None
            if whole is None:
                return None
            joined[name] = whole
        if any([name for name, _ in part._held(self.by_output)] != list(joined) for part in parts):
            return None
        return self._with(joined)

    def _held(self, names: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name in names if (tensor := getattr(self, name)) is not None]

    def _same_shared(self, other: PackedForm) -> bool:
        mine, others = dict(self._held(self.shared)), dict(other._held(self.shared))
        return mine.keys() == others.keys() and all(mine[name].equal(others[name]) for name in mine)

    def _with(self, tensors: dict[str, torch.Tensor]) -> Self:
        return replace(self, **tensors)  # type: ignore[type-var]  # every form of this kind is a dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Dense(PackedForm):
    """Plain numbers of the model's dtype, in any strides: [out, in] of a linear layer, or any other parameter.

    Parts of one merged tensor (q, k, v; gate, up) are views whose rows follow each other in one storage.
    """

    by_output: ClassVar[tuple[str, ...]] = ("tensor",)

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    def dequantize(self) -> torch.Tensor:
        """A copy in float32."""
        return self.tensor.float().clone()

    def inputs(self, start: int, stop: int) -> Dense:
        """A view of those columns."""
        return Dense(self.tensor[:, start:stop])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelInt8(PackedForm):
    """weight[o, i] = codes[o, i] * scales[o] * factor: one scale an output (LLM.int8(), arXiv:2208.07339, without
    outliers).

    Attributes:
        codes: int8 [out, in], contiguous. scales: float32 [out].
        factor: of all weights: a format whose scale is of 127 steps (bitsandbytes) has 1 / 127 here, since scales
            divided beforehand are rounded otherwise.
        activation: "none": x stays as it is; "per-token": the format was made for int8 x, one scale a row, and a
            kernel may compute so where the model's dtype is of 16 bits. In float32 no kernel rounds x.
    """

    by_output: ClassVar[tuple[str, ...]] = ("codes", "scales")

    codes: torch.Tensor
    scales: torch.Tensor
    activation: Literal["none", "per-token"] = "none"
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes: (out, in)."""
        return tuple(self.codes.shape)

    @property
    def kind(self) -> tuple[object, ...]:
        """Activation and factor."""
        return (self.activation, self.factor)

    def dequantize(self) -> torch.Tensor:
        """(codes * scales) * factor, in float32."""
        return self.codes.float().mul_(self.scales.unsqueeze(1)).mul_(self.factor)

    def inputs(self, start: int, stop: int) -> ChannelInt8:
        """Those columns of the codes, with the same scales."""
        return replace(self, codes=self.codes[:, start:stop].contiguous())


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
