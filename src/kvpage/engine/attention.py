"""The attention backend of an engine: what a model needs of one, made on trial before it is chosen, and the KV memory
made with it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from kvpage.api.attention import AttentionBackend, AttentionEnv, AttentionNeed
from kvpage.api.kv import KVLayout
from kvpage.api.model import PagedModelSpec
from kvpage.api.records import AttentionBackendRecord
from kvpage.config import EngineOptions, GroupFacts, MachineFacts, ModelFacts, Resolved, resolve
from kvpage.errors import ConfigError, PluginError
from kvpage.inspect.machine import available_memory, total_memory
from kvpage.loading.memory import Arena
from kvpage.nn.rotary import build_rope
from kvpage.plugins import BackendChoice
from kvpage.plugins.discovery import describe
from kvpage.plugins.selection import Trial
from kvpage.runner.kvstore import KVStore


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
        head_dims=frozenset(size for m in layers for size in (m.head_dim, m.v_head_dim)),
        block_size=options.block_size,
        features=frozenset(name for name, needed in features.items() if needed),
    )


def group_facts(spec: PagedModelSpec) -> list[GroupFacts]:
    """The spec's KV groups, as far as memory goes."""
    return [
        GroupFacts(
            elements_per_token=group.bytes_per_token(1),
            vectors_per_token=2 * len(group.layers) * group.num_kv_heads,
            window=group.window,
        )
        for group in spec.kv_groups
    ]


def laid_out_facts(
    options: EngineOptions, spec: PagedModelSpec, device: str, dtype: str, choice: BackendChoice
) -> list[GroupFacts]:
    """``group_facts``, with blocks of the size that the chosen backend's layout gives them.

    Raises:
        PluginError: the backend cannot be made.
    """
    config = _over_few_blocks(options, spec, device, dtype, choice.block_size)
    facts = []
    for index, group in enumerate(group_facts(spec)):
        env = attention_env(spec, config, index)
        layout = make_backend(choice.record.name, choice.backend, env)[1]
        element: torch.dtype = getattr(torch, layout.dtype)
        size = math.prod(layout.shape[1:]) * element.itemsize * len(spec.kv_groups[index].layers)
        facts.append(replace(group, bytes_per_block=size))
    return facts


def machine_facts(device: str) -> MachineFacts:
    """Memory of the machine, as it is now."""
    return MachineFacts(device=device, available=available_memory(), total=total_memory())


def attention_trial(options: EngineOptions, spec: PagedModelSpec, device: str, dtype: str) -> Trial:
    """Makes a backend for each KV group of ``spec``, over a pool of few blocks, and lets it go again.

    So a backend that cannot be made gives way to the next one before a weight is read.
    """

    def attempt(record: AttentionBackendRecord, kind: type[AttentionBackend], block_size: int) -> None:
        config = _over_few_blocks(options, spec, device, dtype, block_size)
        for index in range(len(spec.kv_groups)):
            make_backend(record.name, kind, attention_env(spec, config, index))

    return attempt


def _over_few_blocks(
    options: EngineOptions, spec: PagedModelSpec, device: str, dtype: str, block_size: int
) -> Resolved:
    """What an engine would run with, but for the size of its pool."""
    facts = ModelFacts(context=spec.max_position, dtype=dtype, groups=group_facts(spec))
    machine = MachineFacts(device=device, available=0, total=0)
    few = replace(options, num_kv_blocks=1, kv_cache_memory=None)
    return resolve(few, facts, machine, block_size)


def attention_env(spec: PagedModelSpec, config: Resolved, index: int) -> AttentionEnv:
    """The fixed values of KV group ``index``."""
    group = spec.kv_groups[index]
    return AttentionEnv(
        device=config.device,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        num_heads=next(layer.num_heads for layer in spec.attention if layer.kv_group == index),
        num_kv_heads=group.num_kv_heads,
        head_dim=group.head_dim,
        v_head_dim=group.v_head_dim,
        block_size=config.block_size,
        num_blocks=config.num_blocks[index] + 1,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )


def make_backend(
    name: str, kind: type[AttentionBackend], env: AttentionEnv
) -> tuple[AttentionBackend, KVLayout]:
    """An object of the attention backend ``name`` for one KV group, and what it wants the KV tensors to be.

    Raises:
        PluginError: it cannot be made, or its layout is none.
    """
    try:
        backend = kind(env)
        layout = backend.kv_layout()
    except MemoryError:
        raise
    except Exception as error:  # foreign code
        raise PluginError(f"{name}: it cannot be made ({describe(error)})") from error
    fault = _fault(layout, env)
    if fault:
        raise PluginError(f"{name}: kv_layout() gives {fault}")
    return backend, layout


def _fault(layout: object, env: AttentionEnv) -> str:
    """What is wrong with a layout, or ""."""
    if not isinstance(layout, KVLayout):
        return f"{layout!r:.80}, which is no kvpage.api.kv.KVLayout"
    shape, dtype = layout.shape, layout.dtype
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        return f"the dtype {dtype!r:.80}, which torch does not have; dtypes are named as in {env.kv_dtype!r}"
    if (
        not isinstance(shape, (tuple, list))
        or not shape
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        return f"the shape {shape!r:.80}; a shape is a tuple of whole numbers above 0"
    if shape[0] != env.num_blocks:
        return f"the shape {tuple(shape)}; its first entry must be env.num_blocks = {env.num_blocks}"
    return ""


def rope_switch(spec: PagedModelSpec, max_model_len: int) -> int | None:
    """Tokens beyond which a sequence turns by the long factors of its rope; ``None``: all turn in one way.

    Raises:
        ConfigError: layers differ in that number.
    """
    found = {m.rope.switch for m in spec.attention if m.rope is not None}
    switches = sorted(switch for switch in found if switch is not None and switch < max_model_len)
    if len(switches) > 1:
        raise ConfigError(
            f"{spec.family}: its layers take their long rope beyond {' and '.join(map(str, switches))} tokens, and kvpage "
            f"has one such number a model: set max_model_len to at most {switches[0]}"
        )
    return switches[0] if switches else None


def make_kv_store(spec: PagedModelSpec, choice: BackendChoice, config: Resolved, arena: Arena) -> KVStore:
    """KV memory of every group, in ``arena``.

    Raises:
        PluginError: the backend cannot be made for so many blocks.
    """
    switch = rope_switch(spec, config.max_model_len)

    def made(index: int) -> tuple[AttentionBackend, KVLayout]:
        try:
            return make_backend(choice.record.name, choice.backend, attention_env(spec, config, index))
        except PluginError as error:
            raise PluginError(f"attention backend {error}: name another, or leave its plugin out") from error

    return KVStore(
        spec,
        made,
        allocate=functools.partial(arena.allocate, huge_pages=True),
        rope=lambda wanted: build_rope(wanted, config.max_model_len, config.device, switch),
    )
