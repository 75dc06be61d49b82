"""What a checkpoint's ``quantization_config`` says of its matrices, and of some of them by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpage import CheckpointError

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
METHODS = ("gptq", "gptq_marlin")
SKIPPED, MATCHED = "-:", "+:"
"""What a pattern of ``dynamic`` may begin with: modules that were not quantized; those that were, which is what a
pattern means without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a matrix was quantized.

    Attributes:
        bits: of a stored weight.
        group_size: inputs that share a scale, -1 = all of them.
        symmetric: the config says that every zero point is 2**(bits-1). Where it says nothing they are read.
        act_order: groups are of inputs that do not lie side by side, so that g_idx is needed.
        version: 1: zero points are stored less one; 2: as they are.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    version: int


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """The settings of each module: the first pattern whose beginning matches its name, else those of all."""

    of_all: Settings
    patterns: tuple[tuple[re.Pattern[str], Settings], ...]

    def of(self, module: str) -> Settings:
        """A module that the config leaves out has those of all: the file says whether it is quantized."""
        return next((own for pattern, own in self.patterns if pattern.match(module)), self.of_all)


def read_settings(config: Mapping[str, Any]) -> ModuleSettings:
    """Raises CheckpointError: a value that is none of this format, or a variant that is not read here."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise _refusal("dynamic", "an object of patterns", dynamic)
    of_all = _settings(config)
    patterns = []
    for pattern, override in dynamic.items():
        skipped = pattern.startswith(SKIPPED)
        try:
            compiled = re.compile(pattern.removeprefix(SKIPPED).removeprefix(MATCHED))
        except re.error as error:
            raise _refusal("dynamic", f"regular expressions ({error})", pattern) from error
        if not skipped and not isinstance(override, Mapping):
            raise _refusal(f"dynamic[{pattern!r:.80}]", "an object", override)
        patterns.append((compiled, of_all if skipped else _settings({**config, **override})))
    return ModuleSettings(of_all, tuple(patterns))


def _settings(config: Mapping[str, Any]) -> Settings:
    _check_variant(config)
    bits, group_size = config.get("bits"), config.get("group_size")
    if type(bits) is not int or bits not in BITS:
        raise _refusal("bits", "2, 3, 4 or 8", bits)
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise _refusal("group_size", "a positive integer, or -1 for all inputs", group_size)
    static = _flag(config, "static_groups")
    if isinstance(meta := config.get("meta"), Mapping):
        static = static or _flag(meta, "static_groups")
    return Settings(
        bits=bits,
        group_size=group_size,
        symmetric=_flag(config, "sym"),
        act_order=_flag(config, "desc_act") and not static,
        version=VERSIONS[_format(config)],
    )


def _format(config: Mapping[str, Any]) -> str:
    """gptqmodel 7 writes ``format`` beside ``checkpoint_format``."""
    stated = [config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None]
    for value in stated:
        if not isinstance(value, str) or value not in VERSIONS:
            raise _refusal(
                "checkpoint_format",
                f"{' or '.join(VERSIONS)} (others are layouts for one kernel)",
                value,
                "convert it to gptq with the tool that wrote it",
            )
    if len(set(stated)) > 1:
        raise _refusal("format", f"as checkpoint_format, {stated[0]!r}", stated[1])
    return str(stated[0]) if stated else "gptq"


def _check_variant(config: Mapping[str, Any]) -> None:
    if _flag(config, "is_marlin_format"):
        raise _refusal(
            "is_marlin_format",
            "false (Marlin is a layout for one kernel)",
            True,
            "save it as gptq without it",
        )
    for key in ("quant_method", "method"):
        value = config.get(key)
        if value is not None and value not in METHODS:
            raise _refusal(key, " or ".join(METHODS), value)
    pack_dtype = config.get("pack_dtype")
    if pack_dtype not in (None, "int32", "torch.int32"):
        raise _refusal("pack_dtype", "'int32'", pack_dtype, "pack it again with int32")
    _flag(config, "lm_head")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _refusal(key, "true or false", value)
    return bool(value)


def _refusal(
    key: str, expected: str, found: object, way_out: str = "download it again, or use another checkpoint"
) -> CheckpointError:
    return CheckpointError(
        f"quantization_config of a GPTQ checkpoint: {key} should be {expected}, found {found!r:.80}; {way_out}"
    )
