"""An engine's metrics in Prometheus' text format."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from kvpage import AsyncEngine
from kvpage.metrics import HistogramValue, MetricFamily, MetricsSnapshot

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOTH = ("kvpage:", "vllm:")


def prefixes(text: str) -> tuple[str, ...]:
    """``--metrics-prefix`` as prefixes: "vllm", "vllm:", "kvpage:,vllm:", "both"."""
    if text == "both":
        return BOTH
    names = dict.fromkeys(name.strip().rstrip(":") for name in text.split(","))
    return tuple(f"{name}:" if name else "" for name in names)


class Exposition(Collector):
    """Everything that one server tells: a registry of its own, so that several servers of a process do not mix.

    Args:
        labels: of every sample of the engine.
    """

    def __init__(self, name_prefixes: Sequence[str], labels: Mapping[str, str]) -> None:
        self._prefixes, self._labels = tuple(name_prefixes), dict(labels)
        self._shown: Sequence[tuple[MetricFamily, bool]] = ()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def render(self, engine: Iterable[MetricFamily], server: Iterable[MetricFamily]) -> bytes:
        """Text in ``MEDIA_TYPE``, the one format that every scraper reads with colons in names.

        Args:
            engine: named with the prefixes and labelled. server: named as they are.
        """
        self._shown = [*((family, True) for family in engine), *((family, False) for family in server)]
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks for."""
        for family, of_engine in self._shown:
            for prefix in self._prefixes if of_engine else ("",):
                yield _metric(prefix + family.name, family, self._labels if of_engine else {})

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the names of one collector cannot clash."""
        return ()


class LatestSnapshot:
    """The engine's metrics without waiting for a long step: then those of the last time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[MetricsSnapshot] | None = None
        self._last: MetricsSnapshot | None = None

    async def get(self, patience: float) -> MetricsSnapshot | None:
        """Waits ``patience`` seconds at most; ``None`` if there never was a snapshot."""
        if self._asking is None or self._asking.get_loop() is not asyncio.get_running_loop():
            # One question at a time, however often it is scraped while a step lasts.
            self._asking = asyncio.create_task(asyncio.to_thread(self._engine.metrics))
        asking = self._asking
        await asyncio.wait({asking}, timeout=patience)
        if asking.done():
            self._asking = None
            self._last = asking.result()
        return self._last


def _metric(name: str, family: MetricFamily, labels: Mapping[str, str]) -> Metric:
    names = [*family.label_names, *labels]
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=names)
        for sample in family.samples:
            if isinstance(sample.value, HistogramValue):
                buckets = [(_bound(bound), count) for bound, count in sample.value.buckets]
                histogram.add_metric(_values(sample.labels, labels), buckets, sample.value.sum)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.help, labels=names)
    for sample in family.samples:
        if not isinstance(sample.value, HistogramValue):
            metric.add_metric(_values(sample.labels, labels), sample.value)
    return metric


def _values(own: Mapping[str, str], common: Mapping[str, str]) -> list[str]:
    return [*own.values(), *common.values()]


def _bound(value: float) -> str:
    return "+Inf" if math.isinf(value) else repr(float(value))
