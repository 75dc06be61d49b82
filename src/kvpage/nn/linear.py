"""Linear layers: the plain kernel, and several outputs of one input computed as one product.

A row's result must not depend on the number of rows beside it, or a request alone would differ from the same
request in a batch. Measured with torch 2.13 on x86, float32: oneDNN keeps this from 2 rows on, whatever the
number of threads (and is 1.5 to 2 times as fast as MKL on AMD); F.linear, which is MKL, only from 12 rows on.
Fewer rows are therefore computed as that many. bfloat16 and float16 keep it from 1 row on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv
from kvpage.api.quant import Dense, LinearEnv, LinearKernel, WeightForm
from kvpage.errors import PluginError

MIN_ROWS_ONEDNN = 2
MIN_ROWS_FALLBACK = 12


class DenseLinear(LinearKernel):
    """x @ weight.T + bias of a ``Dense`` weight, which stays where it is."""

    name: ClassVar[str] = "torch"
    __slots__ = ("_bias", "_min_rows", "_onednn", "_weight")

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return [] if isinstance(form, Dense) else [f"weights held as {type(form).__name__} (has Dense)"]

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        if not isinstance(form, Dense):
            raise TypeError(f"DenseLinear computes Dense weights, not {type(form).__name__}")
        self._weight = form.tensor
        self._bias = bias
        float32_on_cpu = self._weight.device.type == "cpu" and self._weight.dtype == torch.float32
        self._onednn = find_onednn() if float32_on_cpu else None
        if self._onednn is not None:
            self._min_rows = MIN_ROWS_ONEDNN
        else:
            self._min_rows = MIN_ROWS_FALLBACK if float32_on_cpu else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty((0, self._weight.shape[0]))
        if rows < self._min_rows:
            padding = x[:1].expand(self._min_rows - rows, -1)
            return self._product(torch.cat((x, padding)))[:rows]
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._onednn is not None:
            return self._onednn(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


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
    return make_kernel(weights[f"{name}.weight"], None if bias is None else dense(bias), env)


def build_fused(weights: Mapping[str, WeightForm], names: Sequence[str], env: DecoderEnv) -> FusedLinear:
    """The linear layers ``names``, which share their input."""
    forms = [weights[f"{name}.weight"] for name in names]
    sizes = [form.shape[0] for form in forms]
    merged = merge(forms)
    if merged is None:
        return FusedLinear([build_linear(weights, name, env) for name in names], sizes)
    bias = None
    if f"{names[0]}.bias" in weights:
        biases = [dense(weights[f"{name}.bias"]) for name in names]
        bias = adjacent(biases)
        if bias is None:
            bias = torch.cat(biases)
    return FusedLinear([make_kernel(merged, bias, env)], sizes)


def make_kernel(form: WeightForm, bias: torch.Tensor | None, env: DecoderEnv) -> LinearKernel:
    """The first kernel of ``env`` that supports ``form``, prepared; the plain one is tried last.

    Raises:
        PluginError: none does; the message has every kernel's reasons.
    """
    where = LinearEnv(device=torch.device(env.device).type, dtype=env.dtype)
    refused = []
    kinds: tuple[type[LinearKernel], ...] = (*env.linear_kernels, DenseLinear)
    for kind in kinds:
        reasons = kind.supports(form, where)
        if not reasons:
            kernel = kind()
            kernel.prepare(form, bias)
            return kernel
        refused.append(f"{kind.name}: {'; '.join(reasons)}")
    raise PluginError(
        f"no linear kernel computes {type(form).__name__} weights on {where.device} in {where.dtype}: "
        f"{' | '.join(refused)}. Install a plugin that does, or use a checkpoint of another format."
    )


def merge(forms: Sequence[WeightForm]) -> WeightForm | None:
    """One form of all rows, if they already lie in one tensor; ``None`` if not."""
    tensors = [form.tensor for form in forms if isinstance(form, Dense)]
    if len(tensors) != len(forms):
        return None
    together = adjacent(tensors)
    return None if together is None else Dense(together)


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


def dense(form: WeightForm) -> torch.Tensor:
    """The tensor of a parameter that no format quantizes (norms, biases, embeddings)."""
    if isinstance(form, Dense):
        return form.tensor
    raise PluginError(f"this parameter must be dense, a plugin gave {type(form).__name__}")
