"""What an engine needs of its backends and other parts that plugins bring, and the KV memory made with the chosen
attention backend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch

from kvpage.api.attention import AttentionEnv, AttentionNeed
from kvpage.api.model import DecoderEnv, DecoderSpec, PagedModelSpec
from kvpage.api.quant import WeightForm
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.config import EngineOptions, GroupFacts, MachineFacts, Resolved
from kvpage.errors import ConfigError, PluginError
from kvpage.inspect.machine import available_memory, total_memory
from kvpage.loading.memory import Arena
from kvpage.nn.rotary import build_rope
from kvpage.plugins import BackendChoice, DecoderChoice, PluginRegistry, load
from kvpage.plugins.selection import BuiltDecoder, choose_kernels, no_lines
from kvpage.runner.kvstore import KVStore

LOG = logging.getLogger("kvpage")


@dataclass(frozen=True, slots=True)
class Backends:
    """What an engine computes with. ``decoder``: ``None`` for a model that is computed by code of its own."""

    attention: BackendChoice
    decoder: DecoderChoice | None
    env: DecoderEnv

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm]) -> BuiltDecoder:
        """The model, by the first decoder backend that builds it.

        Raises:
            ConfigError: none does.
            PluginError: the last one fails.
        """
        if self.decoder is None:
            raise PluginError(f"{spec.family} was given no decoder backend")
        built = self.decoder.build(spec, weights, self.env)
        for line in no_lines(built.rejected):
            LOG.info("decoder backend %s", line)
        return built


def choose_backends(
    options: EngineOptions, registry: PluginRegistry, spec: PagedModelSpec, device: str, dtype: str
) -> Backends:
    """Attention backend, decoder backend and linear kernels for a model.

    Raises:
        ConfigError: a backend that ``options`` name is unknown or cannot serve, or none is left.
    """
    need = attention_need(options, spec, device, dtype)
    kernels, lost = choose_kernels(registry.linear_kernels())
    for line in no_lines(lost):
        LOG.warning("linear kernel %s", line)
    env = DecoderEnv(device=device, dtype=dtype, linear_kernels=kernels)
    if isinstance(spec, DecoderSpec):
        decoder = registry.select_decoder(
            need,
            spec,
            env,
            decoder_backend=options.decoder_backend,
            attention_backend=options.attention_backend,
        )
        LOG.debug("decoder backends:\n%s", decoder.explain())
        backends = Backends(decoder.attention, decoder, env)
    elif options.decoder_backend is not None:
        raise ConfigError(
            f"decoder_backend={options.decoder_backend!r} runs models that a family describes, and {spec.family} "
            "is computed by transformers' own code: leave it out"
        )
    else:
        backends = Backends(registry.select_attention_backend(need, options.attention_backend), None, env)
    for line in backends.attention.ignored:
        LOG.warning("%s", line)
    LOG.debug("attention backends:\n%s", backends.attention.explain())
    return backends


def with_backends(
    config: Resolved, attention: BackendChoice, decoder: str, reason: str, path: str
) -> Resolved:
    """``config`` with what was chosen, and why, and by which path the model runs; told to the log in one line."""
    LOG.info("attention backend %s, decoder %s", attention.record.name, decoder)
    reasons = {
        **config.reasons,
        "attention_backend": attention.reason,
        "decoder_backend": reason,
        "model_impl": path,
    }
    return replace(config, attention_backend=attention.record.name, decoder_backend=decoder, reasons=reasons)


def warn_of_broken(registry: PluginRegistry) -> None:
    """A line in the log for each plugin that is broken."""
    for status in registry.statuses():
        if status.status == "failed":
            LOG.warning("plugin %s (%s) is left out: %s", status.name, status.origin, status.reason)


def find_processors(registry: PluginRegistry) -> dict[str, Callable[[], Any]]:
    """What makes each logits processor; one that cannot be had refuses the requests that name it, and no other."""
    found: dict[str, Callable[[], Any]] = {}
    for record in registry.logits_processors():
        try:
            found[record.name] = load(record)
        except PluginError as error:
            LOG.warning("logits processor %s", error)
            found[record.name] = functools.partial(_refuse, str(error))
    return found


def _refuse(reason: str) -> NoReturn:
    raise PluginError(reason)


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
        head_dims=frozenset(size for m in layers for size in (m.head_dim, m.v_head_dim)),
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
        PluginError: it cannot be made.
    """
    if not isinstance(chosen, str):
        return chosen
    known = {record.name: record for record in registry.scheduling_policies()}
    if chosen not in known:
        raise ConfigError(
            f"scheduling_policy={chosen!r} is not registered: use {', '.join(map(repr, sorted(known)))} "
            "or a SchedulingPolicy object"
        )
    kind = load(known[chosen])
    try:
        return cast(SchedulingPolicy, kind())
    except Exception as error:  # a plugin's constructor may raise anything
        raise PluginError(
            f"scheduling policy {chosen!r} cannot be made ({type(error).__name__}: {error}): take another, "
            "or repair its plugin"
        ) from error
