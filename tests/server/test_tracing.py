"""OpenTelemetry spans: one a request, whatever becomes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpage import Engine, PluginRegistry, SamplingParams, hookimpl
from kvpage.api.records import EventListenerRecord
from kvpage_server import tracing

pytest.importorskip("opentelemetry.trace")


class Spans:
    """In place of a tracer: keeps the spans that were started."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def start_span(self, name: str, attributes: dict[str, Any]) -> Any:
        events: list[str] = []
        kept = dict(attributes)
        span = SimpleNamespace(
            name=name,
            attributes=kept,
            events=events,
            ended=0,
            set_attributes=kept.update,
            add_event=lambda event, attributes=None: events.append(event),
        )

        def end() -> None:
            span.ended += 1

        span.end = end
        self.started.append(span)
        return span


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    kept = Spans()
    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda name: kept)
    return kept


def engine(tiny: Path) -> Engine:
    return Engine(tiny, plugins=PluginRegistry([tracing], entry_points=False), num_kv_blocks=64)


def test_a_request_has_one_span_with_its_counts_and_times(tiny: Path, spans: Spans) -> None:
    with engine(tiny) as made:
        (output,) = made.generate(["hello"], SamplingParams(max_tokens=3, ignore_eos=True), progress=False)
    (span,) = spans.started
    assert (span.name, span.ended) == ("llm_request", 1)
    assert span.attributes["gen_ai.request.id"] == output.request_id
    assert span.attributes["gen_ai.usage.prompt_tokens"] == len(output.prompt_token_ids)
    assert span.attributes["gen_ai.usage.completion_tokens"] == 3
    assert span.attributes["gen_ai.latency.time_to_first_token"] == output.metrics.time_to_first_token
    assert span.attributes["gen_ai.latency.e2e"] > 0
    assert span.events == ["first_token", "finished"]


def test_a_request_that_is_cancelled_ends_its_span(tiny: Path, spans: Spans) -> None:
    with engine(tiny) as made:
        handle = made.submit("hello", SamplingParams(max_tokens=50, ignore_eos=True))
        made.step()
        handle.cancel()
        made.step()
    (span,) = spans.started
    assert span.ended == 1
    assert span.events[-1] == "finished"


def test_the_sdk_exports_the_spans(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    with engine(tiny) as made:
        made.generate(["a", "b"], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)
    found = exporter.get_finished_spans()
    assert [span.attributes["gen_ai.usage.completion_tokens"] for span in found] == [2, 2]


def test_without_opentelemetry_the_plugin_is_listed_with_what_to_install(tiny: Path) -> None:
    class Missing:
        @hookimpl
        def kvpage_event_listeners(self) -> list[EventListenerRecord]:
            (record,) = tracing.kvpage_event_listeners()
            return [
                EventListenerRecord(
                    name=record.name,
                    factory=record.factory,
                    needs=("no_such_module",),
                    install=record.install,
                )
            ]

    with Engine(tiny, plugins=PluginRegistry([Missing()], entry_points=False), num_kv_blocks=64) as made:
        (output,) = made.generate(["a"], SamplingParams(max_tokens=1), progress=False)
    assert output.finished
