"""How many requests came by HTTP, how they were answered, and how long that took."""

from __future__ import annotations

from bisect import bisect_left

from kvpage.metrics import HistogramValue, MetricFamily, MetricSample

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
NO_ROUTE = "none"
GONE = 499
"""In place of a status, where the client went before there was one; nginx's number for it."""


class HttpCounts:
    """Written at the end of each request. What clients choose freely never becomes a label: a path counts as the
    route it reached, an unheard-of method as OTHER."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[tuple[str, str], tuple[list[int], list[float]]] = {}

    def observe(self, method: str, status: int | None, handler: str | None, seconds: float) -> None:
        """A request was answered, or given up (``status=None``); ``handler``: the path of its route."""
        method, handler = (method if method in METHODS else "OTHER"), handler or NO_ROUTE
        key = (method, f"{(status or GONE) // 100}xx", handler)
        self._requests[key] = self._requests.get(key, 0) + 1
        counts, total = self._seconds.setdefault(key[::2], ([0] * (len(BOUNDS) + 1), [0.0]))
        counts[bisect_left(BOUNDS, seconds)] += 1
        total[0] += seconds

    def families(self) -> tuple[MetricFamily, ...]:
        """What prometheus-fastapi-instrumentator counts, by its names."""
        return (
            MetricFamily(
                "http_requests", "counter", "Requests by method, status and handler.", "requests",
                ("method", "status", "handler"),
                tuple(
                    MetricSample({"method": m, "status": s, "handler": h}, count)
                    for (m, s, h), count in self._requests.items()
                ),
            ),
            MetricFamily(
                "http_request_duration_seconds", "histogram",
                "From a request's headers to the end of its answer, streams included.", "seconds",
                ("method", "handler"),
                tuple(
                    MetricSample({"method": m, "handler": h}, HistogramValue(BOUNDS, tuple(counts), total[0]))
                    for (m, h), (counts, total) in self._seconds.items()
                ),
            ),
        )  # fmt: skip
