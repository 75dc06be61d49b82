"""Every hook a plugin may implement. Hooks only register: they return records, and are called once an engine."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from kvpage.api.records import (
    AttentionBackendRecord,
    CliCommandRecord,
    EventListenerRecord,
    LogitsProcessorRecord,
    ModelRecord,
)

PROJECT = "kvpage"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvpage_attention_backends() -> Sequence[AttentionBackendRecord]:
    """Attention backends this plugin brings."""
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
def kvpage_event_listeners() -> Sequence[EventListenerRecord]:
    """Event listeners; every engine makes one object of each."""
    return ()


@hookspec
def kvpage_cli_commands() -> Sequence[CliCommandRecord]:
    """Commands of the ``kvpage`` program."""
    return ()
