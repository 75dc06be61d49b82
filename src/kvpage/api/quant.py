"""Weights: what a checkpoint reader, a quantization format and a linear kernel promise each other.

Formats and kernels stay apart: a format turns a checkpoint's tensors into a ``WeightForm`` and never knows the
device; a kernel computes a form and never knows the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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
        """Rows [start, stop) of dimension 0, in consecutive pieces; each is valid until the next is taken."""
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
    """One linear layer: kvpage's name without ``.weight``, and its sizes."""

    name: str
    in_features: int
    out_features: int


class WeightForm(ABC):
    """How a weight [out, in] is held in memory: dense, or one of the quantized forms."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape: (out, in) of a linear layer."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The exact float32 values this form stands for, of ``shape``; a new tensor."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearEnv:
    """Where a linear layer runs: torch device type and dtype name of its activations."""

    device: str
    dtype: str


class LinearKernel(ABC):
    """A way to compute one form on a device; one object serves one weight."""

    name: ClassVar[str]

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


class QuantScheme(ABC):
    """A checkpoint format for linear weights (GPTQ, AWQ, ...)."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> QuantScheme:
        """Read ``config`` (the checkpoint's ``quantization_config``).

        Raises:
            kvpage.errors.CheckpointError: a value this format does not know.
        """

    @abstractmethod
    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        """The tensors that hold ``linear``: suffix of the name in the checkpoint -> what it must be."""

    @abstractmethod
    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        """The form those tensors stand for; ``tensors`` has the keys that ``tensors()`` gave."""
