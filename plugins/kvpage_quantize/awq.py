"""AWQ (arXiv:2306.00978): autoawq's search for scales and clipping, on the CPU, and its packer.

autoawq is not developed any further; its last release, 0.2.9, works under transformers 5 as it is. The model is
float32 while it is searched, which a CPU is faster in than in float16.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import KvpageError
from kvpage_quantize.decoder_layers import check_linear_modules, decoder_layers, linear_modules, load_model
from kvpage_quantize.packed import Packed
from kvpage_quantize.report import LayerError, SquaredError, StepBar
from kvpage_quantize.settings import AwqSettings
from kvpage_quantize.source import Source

VERSION = "0.2.9"
BITS = 4
FORMAT = "gemm"
OUTPUTS = 64
"""Outputs that the clipping search takes at once; it refuses what this does not divide."""

PARALLEL_SEQUENCES = 8
"""Sequences that run through a layer at once."""

MEASURED_ROWS = 4096
"""Tokens that a layer's output error is taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqPackage:
    """Parts of autoawq: its classes by model_type, and the module of its quantizer."""

    architectures: Mapping[str, Any]
    quantizer: Any


def quantize_awq(
    source: Source,
    settings: AwqSettings,
    tokens: Sequence[Sequence[int]],
    package: AwqPackage,
    bar: StepBar,
) -> Packed:
    """The decoder layers' linear modules as AWQ checkpoints hold them, and the norms that scales were folded into.

    Raises:
        KvpageError: transformers is missing, autoawq does not know the architecture, or a module cannot be
            packed.
    """
    model = load_model(source).float()
    prefix, layers = decoder_layers(model)
    check_linear_modules(list(layers), prefix, group_size=settings.group_size, inputs=1, outputs=OUTPUTS)
    wrapper = _wrapper(package, model)
    names = {
        f"{prefix}.{index}.{name}" for index, layer in enumerate(layers) for name in linear_modules(layer)
    }
    packed = Packed(config=awq_config(settings))
    length = len(tokens[0])
    with torch.device("cpu"), _steps(package, bar):
        wrapper.quantize(
            None,
            quant_config={
                "zero_point": True,
                "q_group_size": settings.group_size,
                "w_bit": BITS,
                "version": FORMAT,
            },
            calib_data=[list(sequence) for sequence in tokens],
            max_calib_samples=len(tokens),
            max_calib_seq_len=length,
            n_parallel_calib_samples=PARALLEL_SEQUENCES,
            quantizer_cls=measuring_quantizer(
                package.quantizer.AwqQuantizer, prefix, list(layers), packed.errors
            ),
        )
    for name, module in model.named_modules():
        if name in names:
            packed.modules[name] = {key: tensor.cpu() for key, tensor in module.state_dict().items()}
    inside = tuple(f"{name}." for name in names)
    packed.changed = {
        name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.startswith(inside)
    }
    return packed


def awq_config(settings: AwqSettings) -> dict[str, Any]:
    """``quantization_config`` with autoawq's keys."""
    return {
        "bits": BITS,
        "group_size": settings.group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": FORMAT,
        "zero_point": True,
    }


def measuring_quantizer(
    base: Any, prefix: str, layers: Sequence[torch.nn.Module], errors: list[LayerError]
) -> Any:
    """autoawq's quantizer, which appends to ``errors`` what it does to each linear module."""

    class MeasuringQuantizer(base):  # type: ignore[misc]  # a class of a package without types
        def _get_input_feat(
            self, layer: torch.nn.Module, named_linears: Mapping[str, torch.nn.Linear]
        ) -> Any:
            features = super()._get_input_feat(layer, named_linears)
            self._nearest = {}
            for name, module in named_linears.items():
                rounded = self.pseudo_quantize_tensor(module.weight.data)[0]
                self._nearest[name] = _output_error(features[name], module.weight.data, rounded)
            return features

        def _compute_best_scale(
            self,
            x: torch.Tensor,
            w_mean: torch.Tensor,
            x_mean: torch.Tensor,
            module2inspect: torch.nn.Module,
            *others: Any,
        ) -> Any:
            # The search keeps the weights that it tries scales on as `state_dict()` moved to the CPU. There it is the
            # weights themselves, and the first scales that are tried would stay in them.
            handle = module2inspect.register_state_dict_post_hook(_with_copies)
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *others)
            finally:
                handle.remove()

        def _search_best_clip(
            self, layer: torch.nn.Module, named_linears: Mapping[str, torch.nn.Linear], input_feat: Any
        ) -> Any:
            # Scales are folded in by now, into the features as well; clipping is part of the error.
            self._features = input_feat
            self._scaled = {name: module.weight.data.clone() for name, module in named_linears.items()}
            return super()._search_best_clip(layer, named_linears, input_feat)

        def _apply_quant(self, layer: torch.nn.Module, named_linears: Mapping[str, torch.nn.Linear]) -> None:
            index = next(at for at, other in enumerate(layers) if other is layer)
            for name, module in named_linears.items():
                before = self._scaled[name]
                after = self.pseudo_quantize_tensor(module.weight.data)[0]
                errors.append(
                    LayerError(
                        name=f"{prefix}.{index}.{name}",
                        weight=float((after - before).norm() / before.norm()),
                        output=_output_error(self._features[name], before, after),
                        nearest=self._nearest[name],
                    )
                )
            super()._apply_quant(layer, named_linears)

    return MeasuringQuantizer


def _with_copies(module: torch.nn.Module, state: dict[str, Any], *unused: Any) -> None:
    state.update({name: tensor.clone() for name, tensor in state.items()})


def _output_error(features: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """Norm of the change of the outputs as a share of theirs, over the first tokens of ``features`` [..., in]."""
    error = SquaredError()
    rows = features.reshape(-1, features.shape[-1])[:MEASURED_ROWS].to(before.dtype)
    error.add((rows @ (after - before).t()).square().sum().item(), (rows @ before.t()).square().sum().item())
    return error.relative


def load_package() -> AwqPackage:
    """autoawq's modules that are used: its table of architectures, its quantizer.

    Raises:
        KvpageError: it is not installed, or of another version.
    """
    if importlib.util.find_spec("awq") is None:
        raise KvpageError("--method awq quantizes with autoawq: pip install 'kvpage[awq]'")
    found = importlib.metadata.version("autoawq")
    if found != VERSION:
        raise KvpageError(f"--method awq needs autoawq {VERSION}, found {found}: pip install 'kvpage[awq]'")
    # It says that it is deprecated, and changes the filters in order to be heard.
    with warnings.catch_warnings(record=True):
        try:
            importlib.import_module("awq")
            auto = importlib.import_module("awq.models.auto")
            quantizer = importlib.import_module("awq.quantize.quantizer")
        except ImportError as error:
            raise KvpageError(
                f"--method awq: autoawq {VERSION} cannot be imported here ({error}); pip install 'kvpage[awq]'"
            ) from error
    return AwqPackage(architectures=auto.AWQ_CAUSAL_LM_MODEL_MAP, quantizer=quantizer)


def _wrapper(package: AwqPackage, model: Any) -> Any:
    """autoawq's object for ``model``, which knows where its layers and norms are.

    Raises:
        KvpageError: it does not know this architecture.
    """
    kind = package.architectures.get(model.config.model_type)
    if kind is None:
        raise KvpageError(
            f"autoawq {VERSION} does not know the architecture {model.config.model_type!r} (it knows "
            f"{', '.join(sorted(package.architectures))}): use --method gptq, int8 or fp8"
        )
    return kind(
        model,
        model.config.model_type,
        is_quantized=False,
        config=model.config,
        quant_config=None,
        processor=None,
    )


@contextmanager
def _steps(package: AwqPackage, bar: StepBar) -> Iterator[None]:
    """autoawq's layers on our bar in place of its own; as it was afterwards."""
    own = package.quantizer.tqdm
    package.quantizer.tqdm = functools.partial(_tracked, bar)
    try:
        yield
    finally:
        package.quantizer.tqdm = own


def _tracked(bar: StepBar, steps: Sequence[int], desc: str) -> Iterator[int]:
    return bar.track(steps, f"{desc.lower()}: layers")
