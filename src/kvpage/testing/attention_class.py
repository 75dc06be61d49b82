"""Mistakes that make every case impossible: what is under test is no backend class, or cannot be made."""

from __future__ import annotations

import inspect
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from kvpage.api.attention import AttentionBackend, AttentionCaps, AttentionEnv
from kvpage.testing.attention_layout import require_layout
from kvpage.testing.guest_manners import HostState
from kvpage.testing.suite import ConformanceError

MADE, LAYOUT = "test_backend_can_be_made", "test_layout_has_one_entry_a_block"


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong, and the one test that says so; every other is skipped and names that test."""

    test: str
    finding: str


def class_mistake(backend: object) -> Mistake | None:
    """What is wrong with the class itself, before one is made."""
    text = _no_class(backend) or _wrong_caps(getattr(backend, "caps", None))
    return Mistake(MADE, text) if text else None


def made_mistake(backend: type[AttentionBackend], env: AttentionEnv) -> Mistake | None:
    """What is wrong with one that is made for ``env``; whether it has manners is another test's question."""
    host = HostState.now()
    try:
        return _made_mistake(backend, env)
    finally:
        host.restore()


def _made_mistake(backend: type[AttentionBackend], env: AttentionEnv) -> Mistake | None:
    try:
        made = backend(env)
    except Exception as error:  # whatever it raises is the finding
        return Mistake(MADE, f"{backend.__name__}(env) raised {type(error).__name__}: {error}\n  env: {env}")
    try:
        require_layout(made.kv_layout(), env, backend.caps)
    except ConformanceError as finding:
        return Mistake(LAYOUT, str(finding).partition(": ")[2])
    except Exception as error:  # likewise
        return Mistake(LAYOUT, f"kv_layout() raised {type(error).__name__}: {error}\n  env: {env}")
    return None


def _no_class(backend: object) -> str:
    base = "kvpage.api.attention.AttentionBackend"
    if backend is None:
        return f"backend is not set: name your subclass of {base}"
    if isinstance(backend, AttentionBackend):
        return f"backend is a {type(backend).__name__} object; name the class itself, the suite makes its own objects"
    if not isinstance(backend, type) or not issubclass(backend, AttentionBackend):
        return f"backend = {backend!r:.80} is no subclass of {base}"
    if inspect.isabstract(backend):
        return f"{backend.__name__} is abstract: it lacks {', '.join(sorted(backend.__abstractmethods__))}"
    if not hasattr(backend, "caps"):
        return f"{backend.__name__} has no caps: state what it can do, as an AttentionCaps"
    return ""


def _wrong_caps(caps: object) -> str:
    if not isinstance(caps, AttentionCaps):
        return f"caps is {caps!r:.80}, expected an AttentionCaps"
    for name, kind, optional in (
        ("devices", str, False),
        ("dtypes", str, False),
        ("kv_dtypes", str, False),
        ("features", str, False),
        ("head_dims", int, True),
        ("block_sizes", int, True),
    ):
        value = getattr(caps, name)
        good = isinstance(value, AbstractSet) and all(type(entry) is kind for entry in value)
        if not good and not (optional and value is None):
            return f"caps.{name} is {value!r:.80}, expected a frozenset of {kind.__name__}"
    return ""
