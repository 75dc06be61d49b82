"""What differs from layer to layer in a config: attention windows, and rope parameters a layer type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(cfg: HFConfig, otherwise: Sequence[str]) -> tuple[str, ...]:
    """``layer_types``, one entry a layer; ``otherwise`` where the config does not say."""
    types = cfg.get(list, "layer_types", None)
    if types is None:
        return tuple(otherwise)
    if len(types) != cfg.num_layers:
        raise CheckpointError(
            f"{cfg.source}: layer_types must have {cfg.num_layers} entries (num_hidden_layers), has {len(types)}"
        )
    unknown = sorted({str(kind) for kind in types} - {FULL, SLIDING})
    if unknown:
        raise CheckpointError(
            f"{cfg.source}: layer_types has {', '.join(unknown)}; kvpage has {FULL}, {SLIDING}"
        )
    return tuple(types)


def every_nth_full(cfg: HFConfig, period: int) -> tuple[str, ...]:
    """A type a layer: every ``period``-th is full attention, the others slide."""
    return tuple(FULL if (index + 1) % period == 0 else SLIDING for index in range(cfg.num_layers))


def read_windows(cfg: HFConfig, types: Sequence[str]) -> tuple[int | None, ...]:
    """Each layer's window: ``sliding_window`` where its type slides."""
    stated = cfg.get(int, "sliding_window", None) is not None
    if SLIDING in types and not stated:
        raise CheckpointError(
            f"{cfg.source}: layer_types has {SLIDING}, but sliding_window and use_sliding_window give no window"
        )
    window = cfg.count("sliding_window") if stated else None
    return tuple(window if kind == SLIDING else None for kind in types)


def with_rope_of_types(cfg: HFConfig, thetas: Mapping[str, float]) -> HFConfig:
    """``cfg`` with one entry of ``rope_parameters`` a layer type, as transformers 5 writes it.

    Older configs state ``rope_scaling``, which is for full attention only.

    Args:
        thetas: layer type -> rope_theta where its entry does not say.
    """
    stated = cfg.get(dict, "rope_parameters", None) or {}
    if stated and not any(isinstance(value, Mapping) for value in stated.values()):
        raise CheckpointError(
            f"{cfg.source}: rope_parameters of this family must have an entry for each of {', '.join(thetas)}, "
            f"found {', '.join(map(str, stated))}"
        )
    scaling = cfg.get(dict, "rope_scaling", None)
    entries: dict[str, dict[str, Any]] = {}
    for layer_type, theta in thetas.items():
        entry = dict(cfg.typed(dict, layer_type, stated.get(layer_type) or {}))
        if layer_type == FULL and scaling is not None:
            entry.update(scaling)
        if entry.get("rope_theta") is None:
            entry["rope_theta"] = theta
        entries[layer_type] = entry
    return cfg.with_values(rope_parameters=entries)
