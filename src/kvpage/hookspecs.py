"""Every hook a plugin may implement. Hooks only register: they return records, and are called once a registry.

A plugin is a module (or any object) with functions of these names, marked ``@kvpage.hookimpl``. It may state
``KVPAGE_API_VERSION = "1.0"``, the oldest ``kvpage.api`` it works with.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from kvpage.api.attention import AttentionNeed
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    CliCommandRecord,
    DecoderBackendRecord,
    EventListenerRecord,
    HookRecord,
    KVConnectorRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    ModelRecord,
    ProposerRecord,
    QuantizationSchemeRecord,
    SamplingKernelRecord,
    SchedulingPolicyRecord,
)

PROJECT = "kvpage"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvpage_attention_backends() -> Sequence[AttentionBackendRecord]:
    """Attention backends: where K and V live and how queries attend to them.

    Chosen once an engine: the one named by ``attention_backend``, else by priority, then name, the first whose
    ``caps`` cover what the model needs.
    """
    return ()


@hookspec
def kvpage_decoder_backends() -> Sequence[DecoderBackendRecord]:
    """Decoder backends: run all layers of a model in code of their own, over one attention backend's KV layout.

    Chosen once an engine, together with the attention backend: the one named by ``decoder_backend``, else by
    priority, then name, the first that builds the model; the torch decoder takes what others refuse.
    """
    return ()


@hookspec
def kvpage_checkpoint_readers() -> Sequence[CheckpointReaderRecord]:
    """Checkpoint readers: a file format of weights (safetensors is built in)."""
    return ()


@hookspec
def kvpage_quantization_schemes() -> Sequence[QuantizationSchemeRecord]:
    """Quantization schemes: how a checkpoint's tensors become a weight form; they never know the device."""
    return ()


@hookspec
def kvpage_linear_kernels() -> Sequence[LinearKernelRecord]:
    """Linear kernels: compute a weight form on a device; they never know the file."""
    return ()


@hookspec
def kvpage_sampling_kernels() -> Sequence[SamplingKernelRecord]:
    """Sampling kernels: make tokens of logits, on a device.

    Chosen once an engine: by priority, then name, the first that is for the device and can be made there.
    """
    return ()


@hookspec
def kvpage_models() -> Sequence[ModelRecord]:
    """Model families: which architectures they translate, and the function that does."""
    return ()


@hookspec
def kvpage_logits_processors() -> Sequence[LogitsProcessorRecord]:
    """Logits processors that requests may name in ``SamplingParams.logits_processors``."""
    return ()


@hookspec
def kvpage_proposers() -> Sequence[ProposerRecord]:
    """Proposers of draft tokens. Provisional until speculative decoding lands: listed, not yet used."""
    return ()


@hookspec
def kvpage_scheduling_policies() -> Sequence[SchedulingPolicyRecord]:
    """Scheduling policies, which ``scheduling_policy`` names: who is scheduled first and preempted last."""
    return ()


@hookspec
def kvpage_kv_connectors() -> Sequence[KVConnectorRecord]:
    """KV connectors: blocks that leave the engine and return. Provisional: listed, not yet used."""
    return ()


@hookspec
def kvpage_event_listeners() -> Sequence[EventListenerRecord]:
    """Event listeners; every engine makes one object of each."""
    return ()


@hookspec
def kvpage_cli_commands() -> Sequence[CliCommandRecord]:
    """Commands of the ``kvpage`` program."""
    return ()


@hookspec
def kvpage_addhooks() -> Sequence[HookRecord]:
    """Hooks that this plugin offers to others. They exist before any plugin's hooks are checked, whatever the
    order in which plugins are found."""
    return ()


@hookspec(firstresult=True)
def kvpage_select_attention_backend(need: AttentionNeed, candidates: Sequence[str]) -> str | None:
    """Have a say in which attention backend an engine takes where none is named.

    Args:
        need: what the engine asks of it.
        candidates: the names that can serve ``need``, in the order of preference; the first would be taken.

    Returns:
        One of ``candidates``, or ``None`` to leave the choice to others. Any other answer, or an exception, is
        kept among the reasons and ignored.
    """
    return None
