"""From options to a running core: find the model, plan its memory, load it, choose a backend, put it together."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from kvpage.api.attention import AttentionEnv, AttentionNeed
from kvpage.api.events import EventListener
from kvpage.api.model import AttentionSpec, DecoderEnv, DecoderSpec, ModelDefinition
from kvpage.api.quant import CheckpointView
from kvpage.api.records import Record
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.config import (
    EngineOptions,
    GroupFacts,
    MachineFacts,
    ModelFacts,
    Resolved,
    resolve,
    resolve_dtype,
)
from kvpage.engine.core import EngineCore
from kvpage.engine.executor import LocalExecutor
from kvpage.engine.inputs import ChatTemplates, InputLimits, InputProcessor
from kvpage.engine.stats import Listeners, StatsLog
from kvpage.errors import CheckpointError, ConfigError, PluginError, RequestError
from kvpage.inspect.machine import available_memory, total_memory
from kvpage.loading.hub import resolve as resolve_model
from kvpage.loading.locate import find_folder
from kvpage.loading.memory import Arena, trim_heap
from kvpage.loading.readers import DummyView, ModuleView, open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.define import define
from kvpage.models.hf_config import GenerationDefaults, HFConfig
from kvpage.nn.rotary import build_rope
from kvpage.params import NEUTRAL
from kvpage.plugins import BackendChoice, PluginRegistry, load
from kvpage.runner.batch import BatchBuilder
from kvpage.runner.kvstore import KVStore
from kvpage.runner.runner import ModelRunner
from kvpage.sample.sampler import Sampler
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.scheduler import Scheduler
from kvpage.text.chat import ChatTemplate
from kvpage.text.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer

LOG = logging.getLogger("kvpage")


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A built engine: what steps, what makes requests, and every resolved value."""

    core: EngineCore
    inputs: InputProcessor
    config: Resolved


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a folder, or a living transformers model."""

    folder: Path | None
    module: Any
    config: HFConfig


def build_engine(options: EngineOptions, plugins: PluginRegistry | None) -> EngineParts:
    """Everything an engine needs, or one of kvpage's errors and nothing left behind."""
    registry = PluginRegistry() if plugins is None else plugins
    if not isinstance(registry, PluginRegistry):
        raise ConfigError(
            f"plugins must be a PluginRegistry, got {plugins!r:.80}: PluginRegistry(plugins=[...])"
        )
    source = find_model(options)
    definition, context = define_model(options, source, registry)
    spec = definition.spec
    device = find_device(options.device)
    dtype = resolve_dtype(options, source.config.dtype or "float32")
    choice = registry.select_attention_backend(
        attention_need(options, spec, device, dtype), options.attention_backend
    )
    LOG.debug("attention backends:\n%s", choice.explain())
    arena = Arena()
    try:
        view = _view(options, source, definition)
        weights = load_weights(definition, view, dtype=getattr(torch, dtype), device=device, arena=arena)
        for warning in weights.warnings:
            LOG.warning("%s", warning)
        model = Decoder(spec, weights.weights, DecoderEnv(device=device, dtype=dtype))
        facts = ModelFacts(context=context, dtype=dtype, groups=group_facts(spec))
        config = resolve(options, facts, machine_facts(device), choice.block_size)
        for note in config.notes:
            LOG.info("%s", note)
        tokenizer = _tokenizer(options, source)
        generation = _generation(options, source)
        eos = generation.eos_token_ids or source.config.eos_token_ids
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        processors: dict[str, Callable[[], Any]] = {r.name: load(r) for r in registry.logits_processors()}
        runner = ModelRunner(
            model,
            _kv_store(spec, choice, config, arena),
            BatchBuilder(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                block_size=config.block_size,
                num_groups=len(spec.kv_groups),
            ),
            Sampler(
                vocab_size=spec.vocab_size,
                num_slots=config.max_num_seqs,
                eos_token_ids=eos,
                processors=processors,
                device=device,
            ),
            spec.vocab_size,
        )
        templates = _templates(options, tokenizer)
        core = _core(options, registry, config, spec, runner, tokenizer, arena)
    except BaseException as error:
        arena.close()
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            raise ConfigError(
                f"the engine does not fit into memory ({error}): lower kv_cache_memory or "
                "num_kv_blocks, max_num_seqs or max_model_len"
            ) from error
        raise
    limits = InputLimits(
        vocab_size=spec.vocab_size,
        max_logprobs=options.max_logprobs,
        eos_token_ids=eos,
        processors=frozenset(processors),
    )
    stated = {name: getattr(generation, name) for name in NEUTRAL}
    defaults = stated if options.generation_config == "auto" else {}
    inputs = InputProcessor(tokenizer, templates, limits, defaults, options.seed)
    return EngineParts(core, inputs, config)


def find_model(options: EngineOptions) -> Source:
    """The folder or object that ``options.model`` names, and its config."""
    model = options.model
    if not isinstance(model, (str, os.PathLike)):
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise ConfigError(
                f"model must be a folder, a hub id, 'demo' or a transformers model, got {model!r:.80}"
            )
        return Source(None, model, living_config(model))
    folder = find_folder(options)
    return Source(folder, None, HFConfig.from_folder(folder))


def living_config(model: Any) -> HFConfig:
    """The config of a transformers model in memory; a model made from a config alone states neither its own
    class nor the dtype of its weights."""
    dtype = next(iter(model.state_dict().values())).dtype
    stated = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(dtype)}
    return HFConfig(stated, source=type(model).__name__)


def define_model(
    options: EngineOptions, source: Source, registry: PluginRegistry
) -> tuple[ModelDefinition, int]:
    """(the model as data, its context length)."""
    config = source.config
    if config.quantization is not None:
        method = config.quantization.get("quant_method", "unknown")
        raise CheckpointError(
            f"{config.source} is quantized ({method}) and no loader for that is installed: "
            "use the unquantized checkpoint"
        )
    if options.quantization is not None:
        raise ConfigError(
            f"quantization={options.quantization!r}: no quantization scheme is installed; leave it out"
        )
    return define(load(registry.model_for(config.architectures)), config, options)


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


def attention_need(options: EngineOptions, spec: DecoderSpec, device: str, dtype: str) -> AttentionNeed:
    """What the model asks of an attention backend."""
    layers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]
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


def group_facts(spec: DecoderSpec) -> list[GroupFacts]:
    """The spec's KV groups, as far as memory goes."""
    return [
        GroupFacts(elements_per_token=group.bytes_per_token(1), window=group.window)
        for group in spec.kv_groups
    ]


def machine_facts(device: str) -> MachineFacts:
    """Memory of the machine, as it is now."""
    return MachineFacts(device=device, available=available_memory(), total=total_memory())


def _view(options: EngineOptions, source: Source, definition: ModelDefinition) -> CheckpointView:
    if source.folder is None:
        return ModuleView(source.module)
    if options.load_format == "dummy":
        return DummyView(definition)
    return open_checkpoint(source.folder)


def _kv_store(spec: DecoderSpec, choice: BackendChoice, config: Resolved, arena: Arena) -> KVStore:
    def env(index: int) -> AttentionEnv:
        group = spec.kv_groups[index]
        heads = next(
            layer.mixer.num_heads
            for layer in spec.layers
            if isinstance(layer.mixer, AttentionSpec) and layer.mixer.kv_group == index
        )
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


def _core(
    options: EngineOptions,
    registry: PluginRegistry,
    config: Resolved,
    spec: DecoderSpec,
    runner: ModelRunner,
    tokenizer: Tokenizer | None,
    arena: Arena,
) -> EngineCore:
    blocks = BlockManager(
        block_size=config.block_size,
        groups=[
            GroupConfig(kind=cast(Any, group.kind), num_blocks=count + 1, window=group.window)
            for group, count in zip(spec.kv_groups, config.num_blocks, strict=True)
        ],
        enable_prefix_caching=options.enable_prefix_caching,
        hash_key=options.prefix_cache_key,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            policy=options.scheduling_policy,
            max_num_queued_reqs=options.max_num_queued_reqs,
            max_num_queued_tokens=options.max_num_queued_tokens,
            long_prefill_token_threshold=options.long_prefill_token_threshold,
        ),
        blocks,
    )
    listeners = [_make_listener(record) for record in registry.event_listeners()]

    def release() -> None:
        arena.close()
        trim_heap()

    core = EngineCore(scheduler, blocks, LocalExecutor(runner), tokenizer, Listeners(listeners), release)
    if not options.disable_log_stats:
        core.listeners.add(StatsLog(core.stats))
    return core


def _make_listener(record: Record) -> EventListener:
    try:
        return cast(EventListener, load(record)())
    except PluginError:
        raise
    except Exception as error:  # a plugin's constructor may raise anything
        raise PluginError(
            f"event listener {record.name!r} cannot be made ({type(error).__name__}: {error}): "
            "leave its plugin out or repair it"
        ) from error


def _tokenizer(options: EngineOptions, source: Source) -> Tokenizer | None:
    chosen = options.tokenizer
    if options.skip_tokenizer_init:
        return None
    if chosen is not None and not isinstance(chosen, (str, os.PathLike)):
        return wrap_tokenizer(chosen)
    if chosen is None and source.folder is None:
        return None
    folder = source.folder if chosen is None else resolve_model(
        str(chosen), revision=options.tokenizer_revision, download_dir=options.download_dir, token=options.hf_token
    )  # fmt: skip
    assert folder is not None, "either the model or the option names a folder"
    mode = cast(Any, options.tokenizer_mode)
    return load_tokenizer(folder, mode=mode, trust_remote_code=options.trust_remote_code)


def _templates(options: EngineOptions, tokenizer: Tokenizer | None) -> ChatTemplates:
    """The option's template, else the model's; a model whose own does not compile can still complete prompts."""
    special_tokens = {} if tokenizer is None else tokenizer.special_tokens
    if options.chat_template is not None:
        try:
            return ChatTemplates(ChatTemplate(options.chat_template, special_tokens))
        except RequestError as error:
            raise ConfigError(f"chat_template: {error}") from error
    if tokenizer is None:
        return ChatTemplates()
    found: list[ChatTemplate | None] = []
    for source in (tokenizer.chat_template, tokenizer.chat_template_for(tools=True)):
        try:
            found.append(None if source is None else ChatTemplate(source, special_tokens))
        except RequestError as error:
            LOG.warning("%s", error)
            found.append(None)
    return ChatTemplates(*found)


def _generation(options: EngineOptions, source: Source) -> GenerationDefaults:
    if source.folder is not None:
        return GenerationDefaults.from_folder(source.folder)
    stated = getattr(source.module, "generation_config", None)
    return GenerationDefaults() if stated is None else GenerationDefaults.from_dict(stated.to_dict())
