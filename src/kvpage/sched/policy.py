"""The builtin scheduling policies: which request comes first."""

from __future__ import annotations

from kvpage.api.scheduling import ScheduledRequest, SchedulingPolicy


class FirstComeFirstServed(SchedulingPolicy):
    """In the order of submission."""

    def key(self, request: ScheduledRequest) -> int:
        return 0


class PriorityFirst(SchedulingPolicy):
    """Lower ``priority`` first, then in the order of submission."""

    def key(self, request: ScheduledRequest) -> int:
        return request.priority
