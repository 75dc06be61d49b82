"""The contract of a scheduling policy: which request comes first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvpage.params import PoolingParams, SamplingParams


class ScheduledRequest(Protocol):
    """What a policy may read of a request."""

    @property
    def request_id(self) -> str:
        """Unique among the live requests."""
        ...

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt."""
        ...

    @property
    def params(self) -> SamplingParams | PoolingParams:
        """What it asks for."""
        ...

    @property
    def arrival(self) -> float:
        """Seconds on the scheduler's clock at which it was submitted."""
        ...

    @property
    def priority(self) -> int:
        """Lower goes first, where the policy cares."""
        ...

    @property
    def cache_salt(self) -> str | None:
        """Prefixes are shared only among requests with the same."""
        ...

    @property
    def adapter(self) -> str | None:
        """Likewise."""
        ...


class SchedulingPolicy(ABC):
    """An order over requests. The last in order is the first to be preempted. One object serves one engine."""

    @abstractmethod
    def key(self, request: ScheduledRequest) -> Any:
        """What requests are compared by, smaller first; read once, at submission, never changed.

        Requests with equal keys go in the order of their submission. Keys of all requests must be comparable
        with each other. An exception, or a key that has no order with those of the others (``None``, NaN), refuses
        that request, and no other.
        """
