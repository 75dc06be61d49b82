"""What an engine takes of what plugins bring: backends, linear kernels, logits processors, listeners, a policy."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from kvpage.api.events import EventListener
from kvpage.api.model import DecoderEnv, DecoderSpec, PagedModelSpec
from kvpage.api.quant import WeightForm
from kvpage.api.sampling import SamplingEnv
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.config import EngineOptions, Resolved
from kvpage.engine.attention import attention_need, attention_trial
from kvpage.engine.kernels import KernelLog
from kvpage.errors import ConfigError, PluginError
from kvpage.plugins import BackendChoice, DecoderChoice, PluginRegistry, load
from kvpage.plugins.factories import make, unavailable
from kvpage.plugins.sampling import SamplingChoice, choose_sampling
from kvpage.plugins.selection import BuiltDecoder, Rejected, choose_kernels, no_lines

LOG = logging.getLogger("kvpage")


@dataclass(frozen=True, slots=True)
class Backends:
    """What an engine computes with. ``decoder``: ``None`` for a model that is computed by code of its own.
    ``kernels``: what became of the linear kernels while the model was built."""

    attention: BackendChoice
    decoder: DecoderChoice | None
    env: DecoderEnv
    kernels: KernelLog
    sampling: SamplingChoice

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], *, owned: bool) -> BuiltDecoder:
        """The model, by the first decoder backend that builds it. ``owned``: the weights are this engine's alone.

        Raises:
            ConfigError: none does.
            PluginError: the last one fails.
        """
        if self.decoder is None:
            raise PluginError(f"{spec.family} was given no decoder backend")
        built = self.decoder.build(spec, weights, replace(self.env, weights_owned=owned))
        known = len(self.decoder.rejected)  # of these the log has heard
        _log("decoder backend", built.rejected[known:], built.broken, logging.INFO)
        return built


def _log(kind: str, rejected: Rejected, broken: Collection[str], level: int) -> None:
    """A line for each that was passed over: at WARNING where it is defective."""
    for (name, _), line in zip(rejected, no_lines(rejected), strict=True):
        LOG.log(logging.WARNING if name in broken else level, "%s %s", kind, line)


def choose_backends(
    options: EngineOptions,
    registry: PluginRegistry,
    spec: PagedModelSpec,
    device: str,
    dtype: str,
    level: int = logging.INFO,
) -> Backends:
    """Attention backend, decoder backend, linear kernels and sampling kernel for a model.

    ``level``: at which the log hears of those that were passed over.

    Raises:
        ConfigError: a backend that ``options`` name is unknown or cannot serve, or none is left.
        PluginError: a backend that ``options`` name is defective.
    """
    need = attention_need(options, spec, device, dtype)
    kernels, lost = choose_kernels(registry.linear_kernels())
    for line in no_lines(lost):
        LOG.warning("linear kernel %s", line)
    log = KernelLog(kernels)
    env = DecoderEnv(device=device, dtype=dtype, linear_kernels=tuple(kernels.values()), on_linear=log.note)
    sampling = choose_sampling(registry.sampling_kernels(), SamplingEnv(device, spec.vocab_size))
    _log("sampling kernel", sampling.rejected, sampling.broken, level)
    trial = attention_trial(options, spec, device, dtype)
    if isinstance(spec, DecoderSpec):
        decoder = registry.select_decoder(
            need,
            spec,
            env,
            decoder_backend=options.decoder_backend,
            attention_backend=options.attention_backend,
            trial=trial,
        )
        _log("decoder backend", decoder.rejected, decoder.broken, level)
        backends = Backends(decoder.attention, decoder, env, log, sampling)
    elif options.decoder_backend is not None:
        raise ConfigError(
            f"decoder_backend={options.decoder_backend!r} runs models that a family describes, and {spec.family} "
            "is computed by transformers' own code: leave it out"
        )
    else:
        attention = registry.select_attention_backend(need, options.attention_backend, trial)
        backends = Backends(attention, None, env, log, sampling)
    for line in backends.attention.ignored:
        LOG.warning("%s", line)
    _log("attention backend", backends.attention.rejected, backends.attention.broken, logging.DEBUG)
    return backends


def with_backends(config: Resolved, backends: Backends, decoder: str, reason: str, path: str) -> Resolved:
    """``config`` with what was chosen, and why, and by which path the model runs; told to the log in one line."""
    attention = backends.attention
    LOG.info("attention backend %s, decoder %s", attention.record.name, decoder)
    reasons = {
        **config.reasons,
        "attention_backend": attention.reason,
        "decoder_backend": reason,
        "linear_kernels": (
            backends.kernels.text(f"decoder backend {decoder}")
            if backends.decoder is not None
            else f"none: the model is computed by {decoder}' own code"
        ),
        "sampling_kernel": backends.sampling.reason,
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


def find_policy(chosen: str | SchedulingPolicy, registry: PluginRegistry) -> SchedulingPolicy:
    """The registered policy of that name, made anew, or the given object itself.

    Raises:
        ConfigError: no policy has that name, or the object is none.
        PluginError: it cannot be made.
    """
    if not isinstance(chosen, str):
        if not callable(getattr(chosen, "key", None)):
            raise ConfigError(
                f"scheduling_policy must be the name of a policy or a SchedulingPolicy object, got {chosen!r:.80}"
            )
        return chosen
    known = {record.name: record for record in registry.scheduling_policies()}
    if chosen not in known:
        raise ConfigError(
            f"scheduling_policy={chosen!r} is not registered: use {', '.join(map(repr, sorted(known)))} "
            "or a SchedulingPolicy object"
        )
    policy: SchedulingPolicy = make(known[chosen], SchedulingPolicy, "scheduling policy")
    return policy


def policy_name(chosen: str | SchedulingPolicy) -> str:
    """What messages call it."""
    return chosen if isinstance(chosen, str) else type(chosen).__name__


def make_listeners(registry: PluginRegistry) -> dict[str, EventListener]:
    """The event listeners of an engine by name, but those that lack what they need.

    Raises:
        PluginError: one cannot be made, or is no listener.
    """
    return {
        record.name: make(record, EventListener, "event listener")
        for record in registry.event_listeners()
        if not unavailable(record)
    }
