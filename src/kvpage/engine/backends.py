"""What an engine needs of its backends, and the KV memory made with the chosen one."""

from __future__ import annotations

from typing import cast

import torch

from kvpage.api.attention import AttentionEnv, AttentionNeed
from kvpage.api.model import PagedModelSpec
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.config import EngineOptions, GroupFacts, MachineFacts, Resolved
from kvpage.errors import ConfigError
from kvpage.inspect.machine import available_memory, total_memory
from kvpage.loading.memory import Arena
from kvpage.nn.rotary import build_rope
from kvpage.plugins import BackendChoice, PluginRegistry, load
from kvpage.runner.kvstore import KVStore


def find_device(name: str) -> str:
    """A torch device string.

    Raises:
        ConfigError: unknown, or not available in this process.
    """
    if name == "auto":
        return "cpu"
    if name == "cpu":
        return name
    raise ConfigError(
        f"device={name!r}: only 'cpu' (or 'auto') has a backend so far; GPU backends have not landed"
    )


def attention_need(options: EngineOptions, spec: PagedModelSpec, device: str, dtype: str) -> AttentionNeed:
    """What the model asks of an attention backend."""
    layers = spec.attention
    features = {
        "window": any(m.window is not None for m in layers),
        "softcap": any(m.softcap is not None for m in layers),
        "sinks": any(m.sinks for m in layers),
        "v_head_dim": any(m.v_head_dim != m.head_dim for m in layers),
    }
    return AttentionNeed(
        device=torch.device(device).type,
        dtype=dtype,
        kv_dtype=dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype,
        head_dims=frozenset(m.head_dim for m in layers),
        block_size=options.block_size,
        features=frozenset(name for name, needed in features.items() if needed),
    )


def group_facts(spec: PagedModelSpec) -> list[GroupFacts]:
    """The spec's KV groups, as far as memory goes."""
    return [
        GroupFacts(elements_per_token=group.bytes_per_token(1), window=group.window)
        for group in spec.kv_groups
    ]


def machine_facts(device: str) -> MachineFacts:
    """Memory of the machine, as it is now."""
    return MachineFacts(device=device, available=available_memory(), total=total_memory())


def make_kv_store(spec: PagedModelSpec, choice: BackendChoice, config: Resolved, arena: Arena) -> KVStore:
    """KV memory of every group, in ``arena``."""

    def env(index: int) -> AttentionEnv:
        group = spec.kv_groups[index]
        heads = next(layer.num_heads for layer in spec.attention if layer.kv_group == index)
        return AttentionEnv(
            device=config.device,
            dtype=config.dtype,
            kv_dtype=config.kv_dtype,
            num_heads=heads,
            num_kv_heads=group.num_kv_heads,
            head_dim=group.head_dim,
            v_head_dim=group.v_head_dim,
            block_size=config.block_size,
            num_blocks=config.num_blocks[index] + 1,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
        )

    return KVStore(
        spec,
        choice.backend,
        env=env,
        allocate=arena.allocate,
        rope=lambda wanted: build_rope(wanted, config.max_model_len, config.device),
    )


def find_policy(chosen: str | SchedulingPolicy, registry: PluginRegistry) -> SchedulingPolicy:
    """The registered policy of that name, made anew, or the given object itself.

    Raises:
        ConfigError: no policy has that name.
    """
    if not isinstance(chosen, str):
        return chosen
    known = {record.name: record for record in registry.scheduling_policies()}
    if chosen not in known:
        raise ConfigError(
            f"scheduling_policy={chosen!r} is not registered: use {', '.join(map(repr, sorted(known)))} "
            "or a SchedulingPolicy object"
        )
    return cast(SchedulingPolicy, load(known[chosen])())
