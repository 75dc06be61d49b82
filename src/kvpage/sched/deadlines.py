"""When requests with a timeout are due."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from kvpage.sched.sequence import Request


class Deadlines:
    """A heap of (time, submission number, request). It costs nothing while no request has a timeout."""

    __slots__ = ("_ended", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._ended = 0  # entries of requests that ended before they were due

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Watch ``request`` if it has a timeout."""
        if request.params.timeout is not None:
            heappush(self._heap, (request.arrival + request.params.timeout, request.number, request))

    def discard(self, request: Request) -> None:
        """``request`` ended: its entry goes soon, so that many long timeouts do not pile up."""
        if request.params.timeout is None:
            return
        self._ended += 1
        if self._ended > 16 + len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)
            self._ended = 0

    def due(self, now: float) -> list[Request]:
        """Take out the unfinished requests whose time has come, the earliest first."""
        requests = []
        while self._heap and self._heap[0][0] <= now:
            request = heappop(self._heap)[2]
            if request.finished:
                self._ended -= 1
            else:
                requests.append(request)
        return requests
