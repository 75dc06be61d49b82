"""Scheduling policies: which sequence comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kvpage.errors import ConfigError

if TYPE_CHECKING:
    from kvpage.sched.sequence import Request


class Policy(Protocol):
    """An order over requests. The last in order is the first to be preempted."""

    def key(self, request: Request) -> Any:
        """What requests are compared by, smaller first; read once, at submission, never changed.

        Requests with equal keys go in the order of their submission.
        """


class FirstComeFirstServed:
    """In the order of submission."""

    def key(self, request: Request) -> int:
        return 0


class PriorityFirst:
    """Lower ``Request.priority`` first, then in the order of submission."""

    def key(self, request: Request) -> int:
        return request.priority


def resolve_policy(policy: str | Policy) -> Policy:
    """The built-in policy of that name ("fcfs", "priority"), or the given object itself."""
    if not isinstance(policy, str):
        return policy
    if policy == "fcfs":
        return FirstComeFirstServed()
    if policy == "priority":
        return PriorityFirst()
    raise ConfigError(f"scheduling policy {policy!r} is not known: use 'fcfs', 'priority' or a Policy object")
