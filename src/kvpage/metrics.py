"""What an engine counts and measures, as plain data: the snapshot that ``engine.metrics()`` returns.

Names, types and buckets are those of vLLM's ``/metrics``, without its prefix, so that one substitution turns a
dashboard for the one into a dashboard for the other. A counter's name has no ``_total`` here: exporters add it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

MetricKind: TypeAlias = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """Observations by size.

    Attributes:
        bounds: inclusive upper bounds of the buckets, ascending; one more bucket takes what is above the last.
        counts: observations in each bucket, not cumulative: ``len(bounds) + 1``.
        sum: of all observations.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.counts)

    @property
    def buckets(self) -> list[tuple[float, int]]:
        """(upper bound, observations up to it), as Prometheus wants them; the last bound is infinite."""
        return list(zip([*self.bounds, math.inf], accumulate(self.counts), strict=True))


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One value of a family; ``labels`` has a value for each of the family's label names."""

    labels: Mapping[str, str]
    value: float | HistogramValue


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """All values of one name.

    Attributes:
        name: without prefix, and without the ``_total`` of counters.
        unit: "seconds", "tokens", "blocks", "requests" ..., or "" where there is none.
    """

    name: str
    kind: MetricKind
    help: str
    unit: str
    label_names: tuple[str, ...]
    samples: tuple[MetricSample, ...]


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Every family of one engine at one moment between two steps. Picklable; changes no more.

    Attributes:
        time: ``time.time()`` when it was taken.
        families: in a fixed order, the same in every snapshot of an engine.
    """

    time: float
    families: tuple[MetricFamily, ...]

    def __iter__(self) -> Iterator[MetricFamily]:
        return iter(self.families)

    def __getitem__(self, name: str) -> MetricFamily:
        """The family of that name; KeyError if there is none."""
        for family in self.families:
            if family.name == name:
                return family
        raise KeyError(name)

    def value(self, name: str, **labels: str) -> float:
        """The value of a counter or gauge; KeyError if no sample has these labels."""
        found = self._find(name, labels)
        if isinstance(found, HistogramValue):
            raise KeyError(f"{name} is a histogram: use histogram()")
        return found

    def histogram(self, name: str, **labels: str) -> HistogramValue:
        """The value of a histogram; KeyError if no sample has these labels."""
        found = self._find(name, labels)
        if not isinstance(found, HistogramValue):
            raise KeyError(f"{name} is no histogram: use value()")
        return found

    def _find(self, name: str, labels: Mapping[str, str]) -> float | HistogramValue:
        for sample in self[name].samples:
            if sample.labels == labels:
                return sample.value
        raise KeyError(f"{name}{dict(labels)}")
