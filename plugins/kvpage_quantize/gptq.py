"""GPTQ (arXiv:2210.17323): auto-gptq's solver, layer by layer on the CPU.

Layers are quantized in order, and so are the linear modules of a layer ("true sequential"): each sees what the
quantized ones before it answer. A layer is float32 while its turn lasts, the rest of the model stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvpage import KvpageError
from kvpage_quantize.decoder_layers import (
    LayerCall,
    check_linear_modules,
    decoder_layers,
    linear_groups,
    linear_modules,
    load_model,
    record_calls,
)
from kvpage_quantize.gptq_package import GptqPackage
from kvpage_quantize.packed import Packed
from kvpage_quantize.report import LayerError, StepBar
from kvpage_quantize.settings import WHOLE_ROW, GptqSettings
from kvpage_quantize.source import Source

WORD = 32
"""Bits of a packed word: inputs and outputs are packed in words of one tensor each."""

SMALLEST_SCALE = 2.0**-24
"""The smallest number of float16 above 0."""


def quantize_gptq(
    source: Source,
    settings: GptqSettings,
    tokens: Sequence[Sequence[int]],
    package: GptqPackage,
    bar: StepBar,
) -> Packed:
    """The decoder layers' linear modules as GPTQ checkpoints hold them.

    Raises:
        KvpageError: transformers is missing, a module cannot be packed, or the solver fails.
    """
    model = load_model(source)
    prefix, layers = decoder_layers(model)
    check_linear_modules(list(layers), prefix, group_size=settings.group_size, inputs=WORD, outputs=WORD)
    packed = Packed(config=gptq_config(settings))
    with torch.device("cpu"), torch.no_grad():
        for part in model.base_model.children():
            if part is not layers:
                part.float()
        layers[0].float()
        hidden, calls = record_calls(model, list(layers), tokens)
        for index in bar.track(range(len(layers)), "gptq: layers"):
            own = [sequence[index] for sequence in calls]
            turn = _Turn(layers[index].float(), own, hidden, settings, package)
            for name, tensors, error in turn.quantized(f"{prefix}.{index}"):
                packed.modules[name] = tensors
                packed.errors.append(error)
            hidden = turn.outputs()
            layers[index] = torch.nn.Identity()  # its memory goes
    return packed


def gptq_config(settings: GptqSettings) -> dict[str, Any]:
    """``quantization_config`` with auto-gptq's keys."""
    return {
        "bits": settings.bits,
        "checkpoint_format": "gptq",
        "damp_percent": settings.damp_percent,
        "desc_act": settings.desc_act,
        "group_size": settings.group_size,
        "is_marlin_format": False,
        "model_file_base_name": None,
        "model_name_or_path": None,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": settings.sym,
        "true_sequential": True,
    }


class _Turn:
    """One layer's turn: ``hidden`` [sequence] are its inputs, ``calls`` [sequence] what else it is called with."""

    def __init__(
        self,
        layer: torch.nn.Module,
        calls: Sequence[LayerCall],
        hidden: Sequence[torch.Tensor],
        settings: GptqSettings,
        package: GptqPackage,
    ) -> None:
        self._layer, self._calls, self._hidden = layer, calls, hidden
        self._settings, self._package = settings, package
        self._quantizer = stored_quantizer(package.quantizer)

    def outputs(self) -> list[torch.Tensor]:
        """The layer's outputs as it now is."""
        return [call.run(self._layer, state) for call, state in zip(self._calls, self._hidden, strict=True)]

    def quantized(self, prefix: str) -> list[tuple[str, dict[str, torch.Tensor], LayerError]]:
        """(name, tensors, error) of each linear module; the layer computes with the quantized weights afterwards."""
        found = []
        modules = linear_modules(self._layer)
        for group in linear_groups(self._layer, self._calls[0], self._hidden[0], prefix):
            solvers = {name: self._solver(modules[name]) for name in group}
            self._gather(modules, solvers)
            for name, solver in solvers.items():
                found.append((f"{prefix}.{name}", *self._solve(f"{prefix}.{name}", modules[name], solver)))
        return found

    def _solver(self, module: torch.nn.Linear) -> Any:
        solver = self._package.solver(module)
        solver.quantizer = self._quantizer()
        solver.quantizer.configure(self._settings.bits, perchannel=True, sym=self._settings.sym, mse=False)
        return solver

    def _gather(self, modules: dict[str, torch.nn.Linear], solvers: dict[str, Any]) -> None:
        """Each solver sees its module's inputs for every sequence."""

        def add(solver: Any) -> Callable[..., None]:
            return lambda module, given, answer: solver.add_batch(given[0], answer)

        handles = [modules[name].register_forward_hook(add(solver)) for name, solver in solvers.items()]
        try:
            self.outputs()
        finally:
            for handle in handles:
                handle.remove()

    def _solve(
        self, name: str, module: torch.nn.Linear, solver: Any
    ) -> tuple[dict[str, torch.Tensor], LayerError]:
        settings = self._settings
        before, hessian = module.weight.detach().clone(), solver.H.clone()
        if not bool(hessian.isfinite().all()):
            raise KvpageError(f"{name}: its inputs for the calibration text are infinite or not a number")
        try:
            scale, zero, g_idx = solver.fasterquant(
                percdamp=settings.damp_percent, group_size=settings.group_size, actorder=settings.desc_act
            )
        except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]  # public, and not listed
            raise KvpageError(
                f"{name}: the Hessian of the calibration text is not positive definite; raise --damp-percent (it is "
                f"{settings.damp_percent}) or --calibration-samples"
            ) from failure
        solver.free()
        nearest = self._nearest(before)
        error = LayerError(
            name=name,
            weight=float((module.weight - before).norm() / before.norm()),
            output=output_error(module.weight - before, before, hessian),
            nearest=output_error(nearest - before, before, hessian),
        )
        return self._pack(module, scale, zero, g_idx), error

    def _nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` rounded to nearest in the same format."""
        size = weight.shape[1] if self._settings.group_size == WHOLE_ROW else self._settings.group_size
        rows = weight.reshape(-1, size)
        quantizer = self._quantizer()
        quantizer.configure(self._settings.bits, perchannel=True, sym=self._settings.sym, mse=False)
        quantizer.find_params(rows, weight=True)
        rounded: torch.Tensor = quantizer.quantize(rows)
        return rounded.reshape(weight.shape)

    def _pack(
        self, module: torch.nn.Linear, scale: torch.Tensor, zero: torch.Tensor, g_idx: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The module's tensors; scales are float16 numbers already, so that half() is exact."""
        packer = self._package.packer(
            self._settings.bits, self._settings.group_size, module.in_features, module.out_features,
            module.bias is not None,
        )  # fmt: skip
        packer.pack(module, scale, zero, g_idx)
        tensors = {
            "qweight": packer.qweight,
            "qzeros": packer.qzeros,
            "scales": packer.scales.half(),
            "g_idx": packer.g_idx.to(torch.int32),
        }
        return tensors if module.bias is None else {**tensors, "bias": module.bias.detach().half()}


def stored_quantizer(base: Any) -> Any:
    """auto-gptq's Quantizer, whose scales and zero points are those that the file will hold.

    Scales are rounded to float16 before weights are, not after. A zero point of 0 cannot be written: the format
    stores it less 1, and the packer's -1 runs over its neighbours. Such a group (asymmetric, all its weights
    positive) gets the zero point 1 and a scale with which its largest weight is still reached.
    """

    class StoredQuantizer(base):  # type: ignore[misc]  # a class of a package without types
        maxq: torch.Tensor
        scale: torch.Tensor
        zero: torch.Tensor

        def find_params(self, x: torch.Tensor, weight: bool = False) -> None:
            super().find_params(x, weight=weight)
            unwritable = self.zero < 1
            largest = x.flatten(1).amax(dim=1).reshape(self.scale.shape)
            self.scale = torch.where(unwritable, largest / (self.maxq - 1), self.scale)
            self.zero = torch.where(unwritable, torch.ones_like(self.zero), self.zero)
            self.scale = self.scale.half().float().clamp_(min=SMALLEST_SCALE)

    return StoredQuantizer


def output_error(difference: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Norm of the change of the outputs as a share of theirs: sqrt(tr(D H D^T) / tr(W H W^T)), H = X^T X."""
    changed = ((difference @ hessian) * difference).sum()
    whole = ((weight @ hessian) * weight).sum()
    return float((changed.clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())
