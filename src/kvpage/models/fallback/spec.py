"""A model that runs through transformers, as far as the engine needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import AttentionSpec
from kvpage.models.fallback.attention import Refused
from kvpage.models.fallback.probe import AttentionCall, Probed, ProbedParameter
from kvpage.models.hf_config import HFConfig

CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FallbackSpec:
    """A ``PagedModelSpec`` found by a probe.

    Attributes:
        family: name of the transformers class.
        modules: path of each layer's attention module, below the model's body; as long as ``attention``.
        parameters: as transformers names them. Empty for a model in memory.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    kv_groups: tuple[KVGroupSpec, ...]
    attention: tuple[AttentionSpec, ...]
    modules: tuple[str, ...]
    parameters: tuple[ProbedParameter, ...]


def make_spec(family: str, probed: Probed, max_position: int) -> FallbackSpec:
    """The spec of a probed model."""
    attention, groups = _place(probed.attention)
    return FallbackSpec(
        family=family,
        vocab_size=probed.vocab_size,
        hidden_size=probed.hidden_size,
        max_position=max_position,
        kv_groups=groups,
        attention=attention,
        modules=tuple(call.module for call in probed.attention),
        parameters=probed.parameters,
    )


def stated_context(config: HFConfig, max_model_len: int | None) -> int:
    """Positions that a model has by its config, stretched where linear or yarn rope scaling adds to them.

    Raises:
        Refused: the config does not say, and neither does ``max_model_len``.
    """
    stated = next((config.count(key) for key in CONTEXT_KEYS if config.get(int, key, None)), None)
    if stated is None:
        if max_model_len is None:
            raise Refused(f"its config states no context ({', '.join(CONTEXT_KEYS)}): give max_model_len")
        return max_model_len
    rope = config.get(dict, "rope_parameters", None) or config.get(dict, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, int | float) or kind not in ("linear", "yarn"):
        return stated
    trained = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(stated, int((trained or stated) * factor))


def _place(calls: Sequence[AttentionCall]) -> tuple[tuple[AttentionSpec, ...], tuple[KVGroupSpec, ...]]:
    """Each layer's attention with its place in the cache, and the groups: one a distinct shape and window."""
    members: dict[tuple[int | None, int, int, int], list[int]] = {}
    attention = []
    for index, call in enumerate(calls):
        key = (call.window, call.num_heads, call.num_kv_heads, call.head_dim)
        group = members.setdefault(key, [])
        attention.append(
            AttentionSpec(
                num_heads=call.num_heads,
                num_kv_heads=call.num_kv_heads,
                head_dim=call.head_dim,
                v_head_dim=call.v_head_dim,
                scale=call.scale,
                kv_group=list(members).index(key),
                kv_index=len(group),
                window=call.window,
                softcap=call.softcap,
                sinks=call.sinks,
            )
        )
        group.append(index)
    groups = tuple(
        KVGroupSpec(
            kind="full" if window is None else "window",
            layers=tuple(layers),
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            window=window,
        )
        for (window, _, kv_heads, head_dim), layers in members.items()
    )
    return tuple(attention), groups
