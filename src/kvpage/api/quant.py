"""Weights: what a checkpoint reader, a quantization format and a linear kernel promise each other.

Formats and kernels stay apart: a format turns a checkpoint's tensors into a ``WeightForm`` and never knows the
device; a kernel computes a form and never knows the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from kvpage.api.forms import ChannelInt8, Dense, PackedForm, WeightForm, adjacent
from kvpage.api.packed_forms import Codebook, Fp8, GroupedInt

if TYPE_CHECKING:
    import torch

__all__ = [
    "ChannelInt8", "CheckpointView", "Codebook", "Dense", "Fp8", "GroupedInt", "LinearChoice", "LinearEnv",
    "LinearKernel", "LinearRefusal", "LinearSpec", "PackedForm", "QuantScheme", "TensorInfo", "TensorSpec",
    "WeightForm", "adjacent", "metadata",
]  # fmt: skip


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


def metadata(view: CheckpointView) -> Mapping[str, str]:
    """What the files say beside their tensors (the ``__metadata__`` of safetensors); empty for a view without any."""
    found: Mapping[str, str] = getattr(view, "metadata", {})
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor that a format stores for a linear layer.

    Attributes:
        shape: expected shape. dtype: torch dtype name.
        shard_dim: dimension that tensor parallelism cuts, ``None`` = every rank takes it whole. Where no tensor of
            a matrix has one, ranks cut its form (``WeightForm.outputs``, ``inputs``), or what that dequantizes to.
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

    keeps_form: ClassVar[bool] = True
    """``False``: it computes any form from plain numbers. The loader holds what only such kernels support as plain
    numbers to begin with."""

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
    """``True``: ``tensors`` is also asked about the token embedding ("embed.weight", [vocab, hidden]). A tied output
    head is computed from that very form."""

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

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        """The form that ``to_form`` will make, of tensors on the device "meta": shapes and dtypes without numbers.

        ``kvpage plan`` counts its bytes, asks kernels whether they support it, and ranks whether it can be cut.
        ``None``: ``to_form`` itself is tried on such tensors; a scheme whose ``to_form`` looks at numbers answers here.
        """
        return None
