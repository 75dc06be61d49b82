"""Linear layers: the plain kernel, and several outputs of one input computed as one product.

A row's result must not depend on the number of rows beside it, or a request alone would differ from the same
request in a batch. Measured with torch 2.13 on x86, float32: oneDNN keeps this from 2 rows on, whatever the
number of threads (and is 1.5 to 2 times as fast as MKL on AMD); F.linear, which is MKL, only from 12 rows on.
bfloat16 keeps it from 2 rows on (one row is a product of another kind, of other roundings where in_features is
large), float16 from 1. Fewer rows are computed as that many, which costs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv
from kvpage.api.quant import (
    Dense,
    LinearChoice,
    LinearEnv,
    LinearKernel,
    LinearRefusal,
    WeightForm,
    adjacent,
)
from kvpage.errors import PluginError

MIN_ROWS_ONEDNN = 2
MIN_ROWS_BFLOAT16 = 2
MIN_ROWS_FALLBACK = 12


class RowProduct:
    """x [T, in] @ weight.T + bias, each row of it bitwise independent of the rows beside it.

    Attributes:
        min_rows: T of any call is at least this; ``pad`` sees to it.
    """

    __slots__ = ("_onednn", "min_rows")

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        """``device``: torch device type; ``dtype`` of x, weight and bias."""
        self._onednn = find_onednn() if device == "cpu" and dtype == torch.float32 else None
        self.min_rows = 1
        if device == "cpu" and dtype == torch.bfloat16:
            self.min_rows = MIN_ROWS_BFLOAT16
        elif device == "cpu" and dtype == torch.float32:
            self.min_rows = MIN_ROWS_FALLBACK if self._onednn is None else MIN_ROWS_ONEDNN

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._onednn is not None:
            return self._onednn(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in], T > 0, with its first row repeated below where it has too few."""
        missing = self.min_rows - x.shape[0]
        return x if missing <= 0 else torch.cat((x, x[:1].expand(missing, -1)))


class DenseLinear(LinearKernel):
    """x @ weight.T + bias of a ``Dense`` weight, which stays where it is."""

    name: ClassVar[str] = "torch"
    __slots__ = ("_bias", "_product", "_weight")

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return [] if isinstance(form, Dense) else [f"weights held as {type(form).__name__} (has Dense)"]

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        if not isinstance(form, Dense):
            raise TypeError(f"DenseLinear computes Dense weights, not {type(form).__name__}")
        self._weight = form.tensor
        self._bias = bias
        self._product = RowProduct(self._weight.device.type, self._weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows >= self._product.min_rows:
            return self._product(x, self._weight, self._bias)
        if rows == 0:
            return x.new_empty((0, self._weight.shape[0]))
        return self._product(self._product.pad(x), self._weight, self._bias)[:rows]


def find_onednn() -> Callable[..., torch.Tensor] | None:
    """The op that torch's own inductor emits for float32 linears on a CPU; ``None`` in builds without it."""
    found: Callable[..., torch.Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


class FusedLinear:
    """Several linear layers of one input: one product where their weights lie in one tensor, else one each."""

    __slots__ = ("_kernels", "_sizes")

    def __init__(self, kernels: Sequence[LinearKernel], sizes: Sequence[int]) -> None:
        """``kernels``: one for all parts together, or one a part; ``sizes``: outputs of each part."""
        self._kernels = tuple(kernels)
        self._sizes = list(sizes)

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[T, in] -> one [T, size] a part; parts of one product are views of it."""
        if len(self._kernels) == len(self._sizes):
            return [kernel.forward(x) for kernel in self._kernels]
        return self._kernels[0].forward(x).split_with_sizes(self._sizes, 1)


def build_linear(weights: Mapping[str, WeightForm], name: str, env: DecoderEnv) -> LinearKernel:
    """The linear layer whose weight is ``name.weight``, with ``name.bias`` where the model has one."""
    bias = weights.get(f"{name}.bias")
    return make_kernel(weights[f"{name}.weight"], None if bias is None else dense(bias), env, name)


def build_fused(weights: Mapping[str, WeightForm], names: Sequence[str], env: DecoderEnv) -> FusedLinear:
    """The linear layers ``names``, which share their input."""
    forms = [weights[f"{name}.weight"] for name in names]
    sizes = [form.shape[0] for form in forms]
    merged = forms[0].join(forms[1:])
    if merged is None:
        return FusedLinear([build_linear(weights, name, env) for name in names], sizes)
    bias = None
    if f"{names[0]}.bias" in weights:
        biases = [dense(weights[f"{name}.bias"]) for name in names]
        bias = adjacent(biases)
        if bias is None:
            bias = torch.cat(biases)
    others = (name.rpartition(".")[2] for name in names[1:])
    return FusedLinear([make_kernel(merged, bias, env, ", ".join([names[0], *others]))], sizes)


def make_kernel(
    form: WeightForm, bias: torch.Tensor | None, env: DecoderEnv, name: str = "weight"
) -> LinearKernel:
    """The first kernel of ``env`` that supports ``form``, prepared; the plain one is tried last.

    One that fails, or does not give one row of the weight's outputs for one row, is passed over for the next.
    ``name``: of the weight, for messages.

    Raises:
        PluginError: none does; the message has every kernel's reasons.
    """
    where = LinearEnv(device=torch.device(env.device).type, dtype=env.dtype)
    refused: list[LinearRefusal] = []
    found: LinearKernel | None = None
    kinds: list[type[LinearKernel]] = list(dict.fromkeys((*env.linear_kernels, DenseLinear)))
    for kind in kinds:
        try:
            reasons, broken = _refusal(kind, form, where), False
            if not reasons:
                kernel = kind(where)
                kernel.prepare(form, bias)
                reasons = _try(kernel, form, env)
                broken = bool(reasons)
                if not broken:
                    found = kernel
                    break
        except (MemoryError, OSError):
            raise
        except Exception as error:  # foreign code; the next one may do
            reasons, broken = [f"it raised {type(error).__name__}: {error}"], True
        refused.append(LinearRefusal(kernel=kind, reasons=tuple(reasons), broken=broken))
    if env.on_linear is not None:
        env.on_linear(
            LinearChoice(
                weight=name,
                form=type(form).__name__,
                kernel=None if found is None else type(found),
                refused=tuple(refused),
            )
        )
    if found is not None:
        return found
    lines = " | ".join(
        f"{getattr(r.kernel, 'name', r.kernel.__name__)}: {'; '.join(r.reasons)}" for r in refused
    )
    raise PluginError(
        f"{name}: no linear kernel computes {type(form).__name__} weights on {where.device} in {where.dtype}: "
        f"{lines}. Install a plugin that does, or use a checkpoint of another format."
    )


def _refusal(kind: type[LinearKernel], form: WeightForm, where: LinearEnv) -> list[str]:
    """Why ``kind`` does not compute ``form``; empty if it does."""
    reasons = kind.supports(form, where)
    if not isinstance(reasons, (list, tuple)):
        raise TypeError(f"supports() returned {reasons!r:.80}, no list of reasons")
    return [str(reason) for reason in reasons]


def _try(kernel: LinearKernel, form: WeightForm, env: DecoderEnv) -> list[str]:
    """What is wrong with the shape or dtype of what one row gives. The plain product is not in question."""
    if type(kernel) is DenseLinear:
        return []
    dtype: torch.dtype = getattr(torch, env.dtype)
    with torch.inference_mode():
        out = kernel.forward(torch.zeros((1, form.shape[1]), dtype=dtype, device=env.device))
    expected = (1, form.shape[0])
    if not isinstance(out, torch.Tensor) or (tuple(out.shape), out.dtype) != (expected, dtype):
        got = f"{list(out.shape)}, {out.dtype}" if isinstance(out, torch.Tensor) else repr(out)[:80]
        return [f"forward() of one row gave {got}, expected {list(expected)}, {dtype}"]
    return []


def dense(form: WeightForm) -> torch.Tensor:
    """The tensor of a parameter that no format quantizes (norms, biases, embeddings)."""
    if isinstance(form, Dense):
        return form.tensor
    raise PluginError(f"this parameter must be dense, a plugin gave {type(form).__name__}")
