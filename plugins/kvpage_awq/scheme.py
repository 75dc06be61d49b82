"""From a checkpoint's tensors to a form: weight[n, k] = scales[k // group, n] * (q[k, n] - zero[k // group, n])."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, GroupedInt, LinearSpec, QuantScheme, TensorSpec, WeightForm
from kvpage_awq.packing import (
    ROWS,
    STRIDE,
    gemm_codes,
    gemm_zeros,
    gemv_codes,
    gemv_fast_codes,
    gemv_zeros,
)

Layout = Literal["gemm", "gemv", "gemv_fast"]
LAYOUTS: dict[str, Layout] = {
    "gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast", "llm-awq": "gemv_fast",
    # Names of kernels, which read the first layout.
    "marlin": "gemm", "exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm",
}  # fmt: skip
METHODS = ("awq", "awq_marlin")
SCALES = ("float16", "bfloat16", "float32")
PACK = 8
"""Values of 4 bits in an int32."""
WORDS_AT_LEAST = {64: 2, 32: 4}
"""GEMV: a row of zero points has a multiple of so many words, by the group; of 1 where groups are larger."""


class Awq(QuantScheme):
    """Matrices of 4 bits with a zero point for each group of inputs.

    Which modules are such is read from the file: tools disagree on how ``modules_to_not_convert`` is matched. AWQ folds
    scales of channels into the layers before: norms are the checkpoint's own, not those of the base model.
    """

    def __init__(self, layout: Layout, group_size: int, where: Callable[[str], str]) -> None:
        """group_size: -1 = all inputs. where: the file of a tensor, for error messages."""
        self._layout, self._group_size, self._where = layout, group_size, where

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], view: CheckpointView) -> Awq:
        bits, group_size = _either(config, "bits", "w_bit"), _either(config, "group_size", "q_group_size")
        if type(bits) is not int or bits != 4:
            raise _refusal("bits (w_bit)", "4", bits)
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise _refusal(
                "group_size (q_group_size)", "a positive integer, or -1 for all inputs", group_size
            )
        if config.get("zero_point") not in (None, True):
            raise _refusal(
                "zero_point",
                "true (what AutoAWQ and vLLM read has a zero point for each group)",
                config["zero_point"],
                "quantize it with zero_point=True",
            )
        method = config.get("quant_method")
        if method is not None and method not in METHODS:
            raise _refusal("quant_method", " or ".join(METHODS), method)
        skipped = config.get("modules_to_not_convert")
        if skipped is not None and not (
            isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
        ):
            raise _refusal("modules_to_not_convert", "a list of names, or null", skipped)
        _refuse_scaled_activations(view)
        return cls(_layout(config), group_size, view.where)

    def tensors(self, linear: LinearSpec, view: CheckpointView) -> Mapping[str, TensorSpec]:
        names = view.names()
        zeros = "qzeros"
        if f"{linear.name}.qzeros" not in names and f"{linear.name}.scaled_zeros" in names:
            zeros = "scaled_zeros"  # llm-awq's name of what GEMV-fast has in qzeros
        if not any(f"{linear.name}.{suffix}" in names for suffix in ("qweight", "scales", zeros)):
            return {}
        self._check_sizes(linear)
        self._check_layout(linear, view)
        stored = {"scales": "float16", zeros: "float16"}
        for suffix in stored:
            name = f"{linear.name}.{suffix}"
            if name in names and view.info(name).dtype in SCALES:
                stored[suffix] = view.info(name).dtype
        specs = self._specs(self._layout, linear, stored["scales"], stored[zeros])
        return {zeros if suffix == "qzeros" else suffix: spec for suffix, spec in specs.items()}

    def to_form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        scales = tensors["scales"]
        self._check_numbers(linear, "scales", scales, scales.isfinite() & (scales >= 0))
        for suffix in ("qzeros", "scaled_zeros"):
            if suffix in tensors and tensors[suffix].is_floating_point():
                self._check_numbers(linear, suffix, tensors[suffix], tensors[suffix].isfinite())
        return self._form(linear, tensors)

    def sketch(self, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
        specs = self.tensors(linear, view)
        tensors = {
            suffix: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            for suffix, spec in specs.items()
        }
        return self._form(linear, tensors) if tensors else None

    def _form(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        """The form of tensors that were checked, or are on the device "meta"."""
        qweight, scales = tensors["qweight"], tensors["scales"]
        qzeros = tensors["qzeros"] if "qzeros" in tensors else tensors["scaled_zeros"]
        # The inputs of a rank are fewer than a group that was of all of them.
        group = min(self._group(linear), linear.in_features)
        groups = linear.in_features // group
        if self._layout == "gemm":
            return GroupedInt(
                codes=gemm_codes(qweight), scales=scales.t().contiguous(), zeros=gemm_zeros(qzeros),
                group=group, activation="per-group",
            )  # fmt: skip
        if self._layout == "gemv":
            return GroupedInt(
                codes=gemv_codes(qweight), scales=scales[:, :groups].contiguous(), zeros=gemv_zeros(qzeros, groups),
                group=group, activation="per-group",
            )  # fmt: skip
        return GroupedInt(
            codes=gemv_fast_codes(qweight), scales=scales[:groups].t().contiguous(), zero=0,
            offsets=qzeros[:groups].t().contiguous(), group=group, activation="per-group",
        )  # fmt: skip

    def _specs(
        self, layout: Layout, linear: LinearSpec, scales: str, offsets: str = "float16"
    ) -> dict[str, TensorSpec]:
        """What a matrix of ``layout`` consists of, with the dimensions that ranks cut where no padding is in the way.

        scales, offsets: dtypes; the latter is that of GEMV-fast's qzeros.
        """
        inputs, outputs = linear.in_features, linear.out_features
        group = self._group(linear)
        groups = inputs // group
        by_outputs = linear.cut == "outputs"
        if layout == "gemm":
            cut = 1 if by_outputs else 0
            # One group is every rank's.
            of_groups = cut if by_outputs or groups > 1 else None
            pack, shared = (PACK, 1) if by_outputs else (1, group if groups > 1 else 1)
            return {
                "qweight": TensorSpec(shape=(inputs, outputs // PACK), dtype="int32", shard_dim=cut, pack=pack),
                "qzeros": TensorSpec(
                    shape=(groups, outputs // PACK), dtype="int32", shard_dim=of_groups, pack=pack, group=shared
                ),
                "scales": TensorSpec(
                    shape=(groups, outputs), dtype=scales, shard_dim=of_groups, group=shared
                ),
            }  # fmt: skip
        words = _padded_words(groups, group)
        if layout == "gemv":
            cut_of = 0 if by_outputs else None
            return {
                "qweight": TensorSpec(shape=(outputs, inputs // PACK), dtype="int32", shard_dim=cut_of),
                "qzeros": TensorSpec(shape=(outputs, words), dtype="int32", shard_dim=cut_of),
                "scales": TensorSpec(shape=(outputs, words * PACK), dtype=scales, shard_dim=cut_of),
            }
        first, second = (0, 1) if by_outputs else (None, None)
        return {
            "qweight": TensorSpec(
                shape=(outputs // ROWS, inputs), dtype="int16", shard_dim=first, pack=ROWS if by_outputs else 1
            ),
            "qzeros": TensorSpec(shape=(words * PACK, outputs), dtype=offsets, shard_dim=second),
            "scales": TensorSpec(shape=(words * PACK, outputs), dtype=scales, shard_dim=second),
        }  # fmt: skip

    def _group(self, linear: LinearSpec) -> int:
        return linear.in_features if self._group_size == -1 else self._group_size

    def _check_sizes(self, linear: LinearSpec) -> None:
        """Groups divide the inputs, words the outputs; each layout has blocks of its own."""
        group = self._group(linear)
        if linear.in_features % group:
            self._refuse(
                linear,
                "scales",
                f"inputs in groups of {group} by quantization_config",
                f"{linear.in_features} inputs",
            )
        if linear.out_features % PACK:
            self._refuse(linear, "qweight", f"outputs that {PACK} divides", f"{linear.out_features} outputs")
        block = {"gemm": 2, "gemv": PACK, "gemv_fast": STRIDE}[self._layout]
        if linear.in_features % block:
            self._refuse(linear, "qweight", f"inputs that {block} divides", f"{linear.in_features} inputs")
        if self._layout != "gemm" and group < 128 and group not in WORDS_AT_LEAST:
            self._refuse(
                linear,
                "qzeros",
                "groups of 32, 64, or 128 and more",
                f"groups of {group} by quantization_config",
            )

    def _check_layout(self, linear: LinearSpec, view: CheckpointView) -> None:
        """The shapes are not those of another layout. Of a square matrix only the scales tell GEMM from GEMV."""
        stored = {}
        for suffix in ("qweight", "scales"):
            name = f"{linear.name}.{suffix}"
            if name not in view.names():
                return  # the loader says that it is missing
            stored[suffix] = view.info(name)
        matching: list[Layout] = []
        for layout in dict.fromkeys(LAYOUTS.values()):
            specs = self._specs(layout, linear, stored["scales"].dtype)
            if all((stored[s].shape, stored[s].dtype) == (specs[s].shape, specs[s].dtype) for s in stored):
                matching.append(layout)
        if matching and self._layout not in matching:
            expected = self._specs(self._layout, linear, stored["scales"].dtype)
            shapes = {suffix: list(info.shape) for suffix, info in stored.items()}
            name = f"{linear.name}.qweight"
            raise CheckpointError(
                f"{self._where(name)}: tensor {name!r} should have shape {list(expected['qweight'].shape)} and scales "
                f"{list(expected['scales'].shape)}, since quantization_config has the version of layout "
                f"{self._layout!r}, found {shapes['qweight']} and {shapes['scales']}, which is {matching[0]!r}; set "
                f'version to "{matching[0]}" there'
            )

    def _check_numbers(
        self, linear: LinearSpec, suffix: str, tensor: torch.Tensor, right: torch.Tensor
    ) -> None:
        if not bool(right.all()):
            self._refuse(
                linear,
                suffix,
                "finite numbers" + (" of at least 0" if suffix == "scales" else ""),
                str(float(tensor[~right][0])),
            )

    def _refuse(self, linear: LinearSpec, suffix: str, expected: str, found: str) -> None:
        name = f"{linear.name}.{suffix}"
        raise CheckpointError(
            f"{self._where(name)}: tensor {name!r} should have {expected}, found {found}; the file is "
            "damaged, or quantization_config belongs to another: download it again"
        )


def _refuse_scaled_activations(view: CheckpointView) -> None:
    """AutoAWQ divides what some activations give (GPT-NeoX, StarCoder2, Falcon) by scales that it folds into the next
    layer; without them the answers would be wrong."""
    names = view.names()
    for name in sorted(names):
        module = name.removesuffix(".scales")
        if module == name or len(view.info(name).shape) != 1 or f"{module}.qweight" in names:
            continue
        if bool((view.read(name) != 1).any()):
            raise CheckpointError(
                f"{view.where(name)}: tensor {name!r} should be 1 everywhere or not be there, found scales of an "
                "activation, which are not applied here; quantize the model with GPTQ, or use the unquantized one"
            )


def _padded_words(groups: int, group: int) -> int:
    """int32 of zero points in a row of GEMV."""
    multiple = WORDS_AT_LEAST.get(group, 1)
    return math.ceil(math.ceil(groups / PACK) / multiple) * multiple


def _layout(config: Mapping[str, Any]) -> Layout:
    """Tools write it in either case; gptqmodel also as ``checkpoint_format``; without any it is GEMM."""
    stated = next(
        (config[key] for key in ("version", "checkpoint_format", "format") if config.get(key) is not None),
        "gemm",
    )
    name = stated.lower() if isinstance(stated, str) else ""
    name = {"llm_awq": "llm-awq", "gemv-fast": "gemv_fast"}.get(name, name)
    if name not in LAYOUTS:
        raise _refusal("version", f"one of {', '.join(LAYOUTS)}", stated)
    return LAYOUTS[name]


def _either(config: Mapping[str, Any], key: str, older: str) -> object:
    """The value of ``key``, or that of its name in AutoAWQ's own file."""
    found, other = config.get(key), config.get(older)
    if found is not None and other is not None and found != other:
        raise _refusal(older, f"as {key}, {found!r}", other)
    return other if found is None else found


def _refusal(
    key: str, expected: str, found: object, way_out: str = "download it again, or use another checkpoint"
) -> CheckpointError:
    return CheckpointError(
        f"quantization_config of an AWQ checkpoint: {key} should be {expected}, found {found!r:.80}; {way_out}"
    )
