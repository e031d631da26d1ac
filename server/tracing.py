"""OpenTelemetry spans of steering: of its operations, and one for the whole of every steered answer.

They go where vLLM's own go: `--otlp-traces-endpoint` makes vLLM set the process's tracer provider. Without a provider,
or without OpenTelemetry, spans cost next to nothing and go nowhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from server.metrics.counts import sum_choices, total
from server.profiles import Resolved

try:
    from opentelemetry import trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    HAS_OPENTELEMETRY = False
else:
    HAS_OPENTELEMETRY = True

_TRACER = "expertsteer"
_PREFIX = "steering."


@contextmanager
def span(name: str, headers: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[None]:
    """Span around a piece of work; spans inside become its children, an error that leaves it is recorded.

    Args:
        name: steering.resolve, steering.stage, steering.activate, ...
        headers: of the HTTP request that caused it; its `traceparent` is the parent unless a span is already open.
        attributes: by name without `steering.`; those that are None are left out.
    """
    if not HAS_OPENTELEMETRY:
        yield
        return
    with trace.get_tracer(_TRACER).start_as_current_span(
        name, context=_parent(headers), attributes=_attributes(attributes)
    ):
        yield


class RequestSpan:
    """Span `steering.request` of one steered answer. A context manager, which ends it if nothing else did.

    It is never the current span: an answer that streams ends in another task than it began in.
    """

    def __init__(self, headers: Mapping[str, str], resolved: Resolved) -> None:
        """Begin it.

        Args:
            headers: of the HTTP request.
            resolved: what it is steered with.
        """
        self._resolved = resolved
        self._span: Span | None = None
        if HAS_OPENTELEMETRY:
            terms = resolved.terms
            attributes = {
                "profile": ",".join(term.profile.name for term in terms),
                "bundle": ",".join(term.profile.settings.bundle for term in terms),
                "strength": ",".join(f"{term.strength:g}" for term in terms),
                "scope": ",".join(term.scope.value for term in terms),
            }
            self._span = trace.get_tracer(_TRACER).start_span(
                "steering.request", _parent(headers), SpanKind.INTERNAL, _attributes(attributes)
            )

    def finish(self, outcome: str, counts: Mapping[str, Sequence[int]]) -> None:
        """End it. A second call does nothing.

        Args:
            outcome: ok, refused, aborted or failed.
            counts: tokens steered, see `SteeringMetrics.admitted`.
        """
        if self._span is None:
            return
        ended, self._span = self._span, None
        if ended.is_recording():
            tokens = total(sum_choices(counts, sum(1 for term in self._resolved.terms if term.strength)))
            ended.set_attributes(
                _attributes(
                    {
                        "outcome": outcome,
                        "prompt_tokens": tokens.prompt,
                        "generation_tokens": tokens.generation,
                    }
                )
            )
            if outcome == "failed":
                ended.set_status(Status(StatusCode.ERROR))
        ended.end()

    def __enter__(self) -> "RequestSpan":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._span is not None and error is not None:
            self._span.record_exception(error)
        self.finish("aborted" if error is None else "failed", {})


def request_span(headers: Mapping[str, str], resolved: Resolved) -> RequestSpan:
    """Begin the span of one steered answer.

    Args:
        headers: of the HTTP request; its `traceparent` is the parent unless a span is already open.
        resolved: what it is steered with.
    """
    return RequestSpan(headers, resolved)


def _parent(headers: Mapping[str, str] | None) -> Any:
    """Context to begin a span in; None is the current one."""
    if not headers or trace.get_current_span().get_span_context().is_valid:
        return None
    return TraceContextTextMapPropagator().extract(headers)


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_PREFIX + key: _attribute(value) for key, value in values.items() if value is not None}


def _attribute(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    return str(value)
