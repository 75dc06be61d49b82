"""The ``quantization_config`` of compressed-tensors: groups of modules that are stored alike, all of it checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpage import CheckpointError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
REFUSED = {
    "nvfp4-pack-quantized": "4-bit floats with two levels of scales",
    "mxfp4-pack-quantized": "4-bit floats with shared exponents",
    "mxfp6-pack-quantized": "6-bit floats with shared exponents",
    "mxfp8-quantized": "8-bit floats with shared exponents",
    "marlin-24": "2:4 sparse weights in the order of one GPU kernel",
    "sparse-bitmask": "sparse weights",
    "sparse-24-bitmask": "2:4 sparse weights",
    "dense": "weights that were rounded but are stored plain: remove the quantization_config to run them",
    "mixed-precision": "a name for several formats, and this group states none of its own",
}
STRATEGIES = {"int": ("tensor", "channel", "group"), "float": ("tensor", "channel", "group", "block")}


class Targets:
    """Which modules a list of targets means: names, "re:" and a pattern from a name's start, or all of a class
    ("Linear", "Embedding")."""

    def __init__(self, key: str, targets: Iterable[str]) -> None:
        self._names = frozenset(targets)
        self._patterns: list[re.Pattern[str]] = []
        for target in sorted(self._names):
            if target.startswith("re:"):
                try:
                    self._patterns.append(re.compile(target.removeprefix("re:")))
                except (re.error, OverflowError, RecursionError) as error:
                    raise wrong(key, f"a regular expression after 're:' ({error})", target) from error

    def match(self, module: str, kind: str = "Linear") -> bool:
        """Whether ``module``, of class ``kind``, is meant."""
        named = kind in self._names or module in self._names
        return named or any(pattern.match(module) for pattern in self._patterns)


@dataclass(frozen=True, kw_only=True)
class Group:
    """How the matrices that ``targets`` means are stored.

    Attributes:
        name: its key in config_groups.
        packed: several codes in an int32 word, else one an element.
        floats: codes are E4M3, else signed integers of ``bits``.
        symmetric: no zero points.
        strategy: what shares a scale: tensor, channel (an output), group of inputs, block of both.
        group_size, block: of those; 0 where there are none.
        act_order: ``weight_g_idx`` says which group an input is of.
        activations: what the model was made for, ``None`` = as they are. static: with a scale that is stored.
    """

    name: str
    targets: Targets
    packed: bool
    floats: bool
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    act_order: bool
    activations: str | None
    static: bool

    def scale_block(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Outputs and inputs that share a scale, of a matrix of that size; at least 1 each."""
        return {
            "tensor": (max(out_features, 1), max(in_features, 1)),
            "channel": (1, max(in_features, 1)),
            "group": (1, self.group_size),
            "block": self.block,
        }[self.strategy]


def read_groups(config: Mapping[str, Any]) -> tuple[list[Group], Targets]:
    """(groups whose weights are quantized, modules that are left out).

    Raises:
        CheckpointError: a value that is wrong, or that stands for what kvpage does not compute.
    """
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise wrong("quantization_status", "compressed or frozen", status)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or (sparsity and sparsity.get("format") != "dense"):
        raise wrong("sparsity_config", "empty or of format dense (sparse weights are not read)", sparsity)
    if config.get("transform_config"):
        raise wrong(
            "transform_config",
            "empty (transforms are not applied to activations)",
            config["transform_config"],
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise wrong("config_groups", "an object of at least one group", groups)
    found = [_read_group(str(name), group, config.get("format")) for name, group in groups.items()]
    ignore = Targets("ignore", _strings("ignore", config.get("ignore") or []))
    return [group for group in found if group is not None], ignore


def wrong(key: str, expected: str, found: object) -> CheckpointError:
    """The error of a value of the config."""
    return CheckpointError(
        f"quantization_config (compressed-tensors): {key} should be {expected}, found {found!r:.80}; use a checkpoint "
        "that states it so, or the unquantized one"
    )


def _read_group(name: str, group: Any, whole_format: Any) -> Group | None:
    """``None``: a group of activations or of the KV cache only."""
    key = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise wrong(key, "an object", group)
    if group.get("output_activations") is not None:
        raise wrong(
            f"{key}.output_activations", "null (outputs are not rounded)", group["output_activations"]
        )
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise wrong(f"{key}.weights", "an object or null", weights)
    stated = _read_format(key, group.get("format") or whole_format)
    activations, static = _read_activations(f"{key}.input_activations", group.get("input_activations"))
    key += ".weights"
    kind = _one_of(f"{key}.type", weights.get("type", "int"), STRATEGIES)
    floats = kind == "float"
    if stated != "naive-quantized" and floats != (stated == "float-quantized"):
        raise wrong(f"{key}.type", f"{'int' if floats else 'float'}, beside format {stated}", kind)
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or not (bits == 8 if floats else 2 <= bits <= 8):
        raise wrong(f"{key}.num_bits", "8 of floats" if floats else "2 to 8", bits)
    if weights.get("dynamic"):
        raise wrong(f"{key}.dynamic", "false", weights["dynamic"])
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool) or (floats and not symmetric):
        raise wrong(f"{key}.symmetric", "true of floats" if floats else "true or false", symmetric)
    strategy, group_size, block = _read_strategy(key, weights, STRATEGIES[kind])
    return Group(
        name=name,
        targets=Targets(f"{name}.targets", _strings(f"{name}.targets", group.get("targets"))),
        packed=stated == "pack-quantized",
        floats=floats,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        block=block,
        act_order=strategy == "group" and weights.get("actorder") in ("group", "dynamic", True),
        activations=activations,
        static=static,
    )


def _read_format(key: str, stated: Any) -> str:
    if stated not in FORMATS:
        reason = f" ({stated}: {REFUSED[stated]})" if isinstance(stated, str) and stated in REFUSED else ""
        raise wrong(f"{key}.format", f"one of {', '.join(FORMATS)}{reason}", stated)
    return str(stated)


def _read_activations(key: str, stated: Any) -> tuple[str | None, bool]:
    """(int, float or ``None``; whether their scale is stored)."""
    if stated is None:
        return None, False
    if not isinstance(stated, Mapping):
        raise wrong(key, "an object or null", stated)
    if stated.get("num_bits", 8) != 8:
        raise wrong(f"{key}.num_bits", "8 (or no input_activations)", stated["num_bits"])
    return _one_of(f"{key}.type", stated.get("type", "int"), STRATEGIES), not stated.get("dynamic")


def _read_strategy(
    key: str, weights: Mapping[str, Any], known: Collection[str]
) -> tuple[str, int, tuple[int, int]]:
    """(strategy, inputs in a group or 0, outputs and inputs in a block or 0)."""
    size, block = weights.get("group_size"), weights.get("block_structure")
    # Files of the first versions leave it out where the size says it.
    inferred = {None: "tensor", -1: "channel"}.get(size, "group") if size is None or type(size) is int else ""
    strategy = _one_of(f"{key}.strategy", weights.get("strategy") or inferred, known)
    if strategy == "group":
        if type(size) is not int or size < 1:
            raise wrong(f"{key}.group_size", "an integer above 0", size)
        return strategy, size, (0, 0)
    if strategy != "block":
        return strategy, 0, (0, 0)
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        block = [int(part) for part in block.split("x")]
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(_is_size(part) for part in block):
        raise wrong(f"{key}.block_structure", "two sizes above 0 [outputs, inputs]", block)
    return strategy, 0, (block[0], block[1])


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _one_of(key: str, value: Any, known: Collection[str]) -> str:
    found = value.lower() if isinstance(value, str) else value
    if found not in tuple(known):
        raise wrong(key, f"one of {', '.join(known)}", value)
    return str(found)


def _strings(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise wrong(key, "a list of names", value)
    return list(value)
