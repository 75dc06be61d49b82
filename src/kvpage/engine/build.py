"""From options to a running core: find the model, plan its memory, load it, choose a backend, put it together."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, replace
from typing import Any, cast

from kvpage.api.model import PagedModelSpec
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.config import (
    EngineOptions,
    ModelFacts,
    Resolved,
    resolve,
    resolve_dtype,
)
from kvpage.engine.attention import laid_out_facts, machine_facts, make_kv_store, rope_switch
from kvpage.engine.backends import (
    choose_backends,
    find_device,
    find_policy,
    find_processors,
    make_listeners,
    policy_name,
    warn_of_broken,
    with_backends,
)
from kvpage.engine.core import EngineCore
from kvpage.engine.executor import LocalExecutor
from kvpage.engine.inputs import ChatTemplates, InputLimits, InputProcessor
from kvpage.engine.metrics import EngineMetrics
from kvpage.engine.model import make_model
from kvpage.engine.quantization import find_scheme
from kvpage.engine.source import Source, define_model, find_model
from kvpage.engine.stats import Listeners, StatsLog
from kvpage.errors import ConfigError, RequestError
from kvpage.loading.hub import resolve as resolve_model
from kvpage.loading.memory import Arena, trim_heap
from kvpage.models.define import describe_path
from kvpage.models.hf_config import GenerationDefaults
from kvpage.params import NEUTRAL
from kvpage.plugins import PluginRegistry
from kvpage.runner.batch import BatchBuilder
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


def build_engine(options: EngineOptions, plugins: PluginRegistry | None) -> EngineParts:
    """Everything an engine needs, or one of kvpage's errors and nothing left behind."""
    registry = PluginRegistry() if plugins is None else plugins
    if not isinstance(registry, PluginRegistry):
        raise ConfigError(
            f"plugins must be a PluginRegistry, got {plugins!r:.80}: PluginRegistry(plugins=[...])"
        )
    warn_of_broken(registry)
    source = find_model(options, registry)
    definition, context = define_model(options, source, registry)
    path = describe_path(definition)
    LOG.info("model path: %s", path)
    scheme = find_scheme(options, source.config, registry)
    spec = definition.spec
    device = find_device(options.device)
    own_dtype = source.config.dtype or "float32"
    if source.module is not None and options.dtype == "auto" and own_dtype == "float16":
        options = replace(options, dtype=own_dtype)  # its weights are shared as they are
    dtype = resolve_dtype(options, own_dtype, device)
    backends = choose_backends(options, registry, spec, device, dtype)
    arena = Arena()
    try:
        made = make_model(options, source, definition, scheme, backends, arena)
        groups = laid_out_facts(options, spec, device, dtype, backends.attention)
        facts = ModelFacts(context=context, dtype=own_dtype, groups=groups)
        config = resolve(options, facts, machine_facts(device), backends.attention.block_size)
        config = with_backends(config, backends, made.decoder, made.reason, path)
        for note in config.notes:
            LOG.info("%s", note)
        tokenizer = _tokenizer(options, source)
        generation = _generation(options, source)
        eos = generation.eos_token_ids or source.config.eos_token_ids
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        processors = find_processors(registry)
        runner = ModelRunner(
            made.model,
            make_kv_store(spec, backends.attention, config, arena),
            BatchBuilder(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                block_size=config.block_size,
                num_groups=len(spec.kv_groups),
                rope_switch=rope_switch(spec, config.max_model_len),
            ),
            Sampler(
                vocab_size=spec.vocab_size,
                num_slots=config.max_num_seqs,
                eos_token_ids=eos,
                processors=processors,
                kernel=backends.sampling.kernel,
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


def _core(
    options: EngineOptions,
    registry: PluginRegistry,
    config: Resolved,
    spec: PagedModelSpec,
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
            policy=find_policy(options.scheduling_policy, registry),
            policy_name=policy_name(options.scheduling_policy),
            max_num_queued_reqs=options.max_num_queued_reqs,
            max_num_queued_tokens=options.max_num_queued_tokens,
            long_prefill_token_threshold=options.long_prefill_token_threshold,
            rope_switch=rope_switch(spec, config.max_model_len),
        ),
        blocks,
    )

    def release() -> None:
        arena.close()
        trim_heap()

    metrics = EngineMetrics(config.max_model_len, _cache_info(options, config, blocks))
    core = EngineCore(
        scheduler,
        blocks,
        LocalExecutor(runner),
        tokenizer,
        Listeners(make_listeners(registry)),
        metrics,
        release,
    )
    if not options.disable_log_stats:
        core.listeners.add(StatsLog(core.stats))
    return core


def _cache_info(options: EngineOptions, config: Resolved, blocks: BlockManager) -> dict[str, str]:
    """The labels of the metric ``cache_config_info``, under vLLM's names."""
    tokens = config.max_model_len if blocks.capacity is None else blocks.capacity
    values = {
        "block_size": config.block_size,
        "num_gpu_blocks": blocks.usable_blocks,
        "kv_cache_size_tokens": tokens,
        "kv_cache_max_concurrency": f"{tokens / config.max_model_len:.2f}",
        "cache_dtype": config.kv_dtype,
        "enable_prefix_caching": options.enable_prefix_caching,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
    }
    return {name: str(value) for name, value in values.items()}


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
    text, stated = source.own_tokenizer() if chosen is None else (None, None)
    return load_tokenizer(
        folder,
        mode=cast(Any, options.tokenizer_mode),
        trust_remote_code=options.trust_remote_code,
        tokenizer_json=text,
        tokenizer_config=stated,
    )


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
        own = source.own_generation_config()
        return (
            GenerationDefaults.from_folder(source.folder)
            if own is None
            else GenerationDefaults.from_dict(own)
        )
    stated = getattr(source.module, "generation_config", None)
    return GenerationDefaults() if stated is None else GenerationDefaults.from_dict(stated.to_dict())
