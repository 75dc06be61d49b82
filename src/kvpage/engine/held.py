"""What an engine would hold of a quantized checkpoint, asked of its scheme and of the kernels; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvpage.api.model import ModelDefinition
from kvpage.api.parameters import parameters
from kvpage.api.quant import (
    ChannelInt8,
    CheckpointView,
    Codebook,
    Dense,
    Fp8,
    GroupedInt,
    LinearEnv,
    LinearKernel,
    LinearSpec,
    QuantScheme,
    WeightForm,
)
from kvpage.config import EngineOptions
from kvpage.engine.quantization import find_scheme
from kvpage.engine.source import define_model, find_model, open_weights
from kvpage.inspect.held import Held, HeldWeight, Holding
from kvpage.loading.places import present
from kvpage.loading.quantized import linears_of, packed_names, sketch
from kvpage.plugins import PluginRegistry
from kvpage.plugins.selection import choose_kernels


def computes(
    kernels: Sequence[type[LinearKernel]], device: str, dtype: str
) -> Callable[[WeightForm], str | None]:
    """form -> the name of the first kernel that computes it packed on ``device``; ``None``: none does."""
    where = LinearEnv(device=torch.device(device).type, dtype=dtype)

    def kernel_of(form: WeightForm) -> str | None:
        for kind in kernels:
            try:
                if kind.keeps_form and not kind.supports(form, where):
                    return kind.name
            except Exception:  # foreign code: it is heard of where the layer is built
                continue
        return None

    return kernel_of


def holder(
    kernels: Sequence[type[LinearKernel]], device: str, dtype: str, *, int8_activations: bool = True
) -> Callable[[WeightForm], WeightForm | None]:
    """form -> what an engine holds of it: itself, or ``None`` where no kernel computes it packed.

    ``int8_activations=False``: no kernel may round activations, whatever the format allows.
    """
    kernel_of = computes(kernels, device, dtype)

    def hold(form: WeightForm) -> WeightForm | None:
        if not int8_activations and isinstance(form, (GroupedInt, ChannelInt8)):
            form = replace(form, activation="none")
        return form if kernel_of(form) is not None else None

    return hold


def planned_holding(options: EngineOptions, registry: PluginRegistry) -> Holding | None:
    """How a quantized checkpoint is held; ``None`` for a plain one, and where no files are."""
    source = find_model(options, registry, weights=False)
    definition, _ = define_model(options, source, registry)
    choice = find_scheme(options, source.config, registry)
    if choice is None or choice.kind.quantizes_plain or not isinstance(definition, ModelDefinition):
        return None
    view = open_weights(options, source, definition)
    scheme = choice.open(view)
    linears = _linears(scheme, view, definition)
    kernels = list(choose_kernels(registry.linear_kernels())[0].values())

    def holding(device: str, dtype: str, ranks: int) -> Held:
        kernel_of, held = computes(kernels, device, dtype), {}
        outputs = {parameter.name: parameter.shape[0] for parameter in parameters(definition.spec)}
        for linear in linears:
            form = sketch(scheme, linear, view)
            if form is None:
                continue
            kernel = None if isinstance(form, Dense) else kernel_of(form)
            plain = linear.out_features * linear.in_features * getattr(torch, dtype).itemsize
            for name in linear.parameters:
                plain_bytes = plain * outputs[name] // linear.out_features
                held[name] = HeldWeight(
                    form=described(form),
                    nbytes=plain_bytes if kernel is None else _taken(form, outputs[name]).nbytes,
                    plain_bytes=plain_bytes,
                    kernel=kernel,
                    cut=ranks == 1 or kernel is None or _can_be_cut(form, linear, ranks),
                )
        return held

    return holding


def _linears(scheme: QuantScheme, view: CheckpointView, definition: ModelDefinition) -> list[LinearSpec]:
    """The matrices of which the files hold anything."""
    known = packed_names(view)
    refs = {name: present(ref, known) for name, ref in definition.weights.items()}
    members = [parameter for parameter in parameters(definition.spec) if parameter.name in refs]
    return [linear for linear in linears_of(scheme, members, refs) if f"{linear.name}.weight" in known]


def _taken(form: WeightForm, outputs: int) -> WeightForm:
    """``form`` of so many of its outputs: each parameter of a matrix has what all outputs share, such as a permutation."""
    if outputs == form.shape[0]:
        return form
    return form.take(torch.empty(outputs, dtype=torch.int64, device="meta"))


def _can_be_cut(form: WeightForm, linear: LinearSpec, ranks: int) -> bool:
    if linear.cut == "outputs":
        return True  # forms give any outputs
    share = linear.in_features // ranks
    return all(form.inputs(rank * share, (rank + 1) * share) is not None for rank in range(ranks))


def described(form: WeightForm) -> str:
    """A form in words: what is stored of a weight, and what weights share."""
    if isinstance(form, GroupedInt):
        shared = "super-scales" if form.super_scales is not None else ""
        zeros = "zero points" if form.zeros is not None else "offsets" if form.offsets is not None else ""
        order = "act-order" if form.permutation is not None else ""
        parts = [f"{form.bits}-bit integers", f"groups of {form.group}", shared, zeros, order]
        return ", ".join(part for part in parts if part)
    if isinstance(form, ChannelInt8):
        activations = ", int8 activations" if form.activation == "per-token" else ""
        return f"int8, a scale an output{activations}"
    if isinstance(form, Codebook):
        return f"4-bit codes of a table, groups of {form.group}"
    if isinstance(form, Fp8):
        each = "an output" if form.scales.shape[1] == 1 else f"{form.group} inputs"
        return f"fp8 (e4m3), a scale for {each}" if each != "an output" else "fp8 (e4m3), a scale an output"
    return "plain numbers" if isinstance(form, Dense) else type(form).__name__
