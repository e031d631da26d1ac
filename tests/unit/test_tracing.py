"""OpenTelemetry spans, as the SDK exports them."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from artifacts.manifest import Scope
from server import tracing
from server.engine.steering import Steering
from server.profiles import Profile, Resolved, ResolvedTerm
from server.registry.records import ProfileSettings

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


def resolve(*names: str, strength: float = 1.5) -> Resolved:
    settings = [ProfileSettings(f"sha256:{name}", 1.0, 2.0, Scope.ALL, None, (), None, "") for name in names]
    terms = [
        ResolvedTerm(Profile(name, cast(Any, None), each), strength, Scope.PROMPT)
        for name, each in zip(names, settings, strict=True)
    ]
    return Resolved(tuple(terms), Steering("id", ()))


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans that have ended. The process's provider can be set once, so the tracer's source is replaced."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield memory
    provider.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (found,) = exporter.get_finished_spans()
    return found


def parent_id(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def trace_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def test_a_span_has_attributes_and_the_clients_parent(exporter: InMemorySpanExporter) -> None:
    with tracing.span("steering.resolve", HEADERS, profile=["a", "b"], strength=0.5, bundle=None, scope=Scope.ALL):
        pass
    found = only(exporter)
    assert found.name == "steering.resolve"
    assert dict(found.attributes or {}) == {
        "steering.profile": ("a", "b"),
        "steering.strength": 0.5,
        "steering.scope": "all",
    }
    assert (trace_id(found), parent_id(found)) == (TRACE_ID, PARENT_ID)
    assert found.status.status_code is StatusCode.UNSET


async def test_spans_inside_become_children(exporter: InMemorySpanExporter) -> None:
    async def stage() -> None:
        with tracing.span("steering.stage", HEADERS, bundle="sha256:0"):
            await asyncio.sleep(0)

    with tracing.span("steering.activate"):
        await asyncio.gather(stage(), stage())
    first, second, outer = exporter.get_finished_spans()
    assert outer.context is not None
    assert {parent_id(first), parent_id(second)} == {f"{outer.context.span_id:016x}"}
    assert outer.parent is None


def test_an_error_is_recorded_and_goes_on(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="no room"), tracing.span("steering.stage"):
        raise ValueError("no room")
    found = only(exporter)
    assert found.status.status_code is StatusCode.ERROR
    assert [event.name for event in found.events] == ["exception"]


@pytest.mark.parametrize("traceparent", ["", "00-zz-11-01", "\x00" * 80, f"00-{'0' * 32}-{'0' * 16}-01"])
def test_a_broken_traceparent_begins_a_new_trace(exporter: InMemorySpanExporter, traceparent: str) -> None:
    with tracing.span("steering.resolve", {"traceparent": traceparent}):
        pass
    assert only(exporter).parent is None


def test_the_request_span(exporter: InMemorySpanExporter) -> None:
    span = tracing.request_span(HEADERS, resolve("a", "b"))
    assert not exporter.get_finished_spans()
    span.finish("ok", {"x-0": [5, 7, 5, 0], "x-1": [5, 8, 5, 0]})
    found = only(exporter)
    assert found.name == "steering.request"
    assert dict(found.attributes or {}) == {
        "steering.profile": "a,b",
        "steering.bundle": "sha256:a,sha256:b",
        "steering.strength": "1.5,1.5",
        "steering.scope": "prompt,prompt",
        "steering.outcome": "ok",
        "steering.prompt_tokens": 20,
        "steering.generation_tokens": 15,
    }
    assert parent_id(found) == PARENT_ID
    assert found.status.status_code is StatusCode.UNSET


def test_a_request_span_ends_once(exporter: InMemorySpanExporter) -> None:
    with tracing.request_span({}, resolve("a")) as span:
        span.finish("failed", {})
        span.finish("ok", {})
    found = only(exporter)
    assert found.attributes is not None
    assert found.attributes["steering.outcome"] == "failed"
    assert found.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(("error", "outcome"), [(None, "aborted"), (KeyError("x"), "failed")])
def test_a_request_span_that_is_left_ends(
    exporter: InMemorySpanExporter, error: Exception | None, outcome: str
) -> None:
    try:
        with tracing.request_span({}, resolve("a")):
            if error is not None:
                raise error
    except KeyError:
        pass
    found = only(exporter)
    assert found.attributes is not None
    assert found.attributes["steering.outcome"] == outcome
    assert len(found.events) == (error is not None)


async def test_a_request_span_may_end_in_another_task(exporter: InMemorySpanExporter) -> None:
    stack = ExitStack()
    span = stack.enter_context(tracing.request_span(HEADERS, resolve("a", strength=0.0)))

    async def end() -> None:
        span.finish("ok", {})
        stack.close()

    await asyncio.create_task(end())
    attributes = only(exporter).attributes
    assert attributes is not None
    assert (attributes["steering.prompt_tokens"], attributes["steering.generation_tokens"]) == (0, 0)
    assert not trace.get_current_span().get_span_context().is_valid


def test_nothing_happens_without_a_provider() -> None:
    with tracing.span("steering.resolve", HEADERS, profile="a"), tracing.request_span(HEADERS, resolve("a")) as span:
        span.finish("ok", {"x": [1, 2]})


def test_nothing_happens_without_opentelemetry(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "HAS_OPENTELEMETRY", False)
    with tracing.span("steering.resolve", HEADERS, profile="a"), tracing.request_span(HEADERS, resolve("a")) as span:
        span.finish("ok", {"x": [1, 2]})
    assert not exporter.get_finished_spans()
