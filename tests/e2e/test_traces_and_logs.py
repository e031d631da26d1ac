"""What an operator sees of a steered request: a span at the collector and a line in the log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.admin_schema import ProfileSpec

pytestmark = pytest.mark.engine

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REQUEST_ID = "asked-by-a-test"
_EXPORT_TIMEOUT_S = 30


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def wait_for(self, name: str) -> Any:
        """The first span of a name."""
        deadline = time.monotonic() + _EXPORT_TIMEOUT_S
        while time.monotonic() < deadline:
            for span in list(self.spans):
                if span.name == name:
                    return span
            time.sleep(0.2)
        pytest.fail(f"no span {name} came; there were {sorted({span.name for span in self.spans})}")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


@pytest.fixture(scope="module")
def traced(start_operated: Callable[..., AbstractContextManager[Any]], collector: Collector) -> Iterator[Any]:
    flags = ("--otlp-traces-endpoint", collector.url, "--enable-log-requests")
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with start_operated("traced", *flags, bundles=("careful", "late"), **protocol) as operated:
        yield operated


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture(scope="module")
def receipt(traced: Any) -> dict[str, Any]:
    """Of a request with a trace and an id, which has ended."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": REQUEST_ID}
    body = {"model": "lab", "prompt": "What is 7 plus 5?", "max_tokens": 3, "steering_profile": "careful"}
    found: dict[str, Any] = traced.server.client.post("/v1/completions", json=body, headers=headers).json()["steering"]
    return found


def test_span_of_a_request(collector: Collector, receipt: dict[str, Any]) -> None:
    assert collector.wait_for("steering.resolve").trace_id.hex() == TRACE
    span = collector.wait_for("steering.request")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(span)
    assert found["steering.profile"] == "careful"
    assert found["steering.bundle"] == receipt["bundle"]
    assert found["steering.outcome"] == "ok"
    assert found["steering.prompt_tokens"] + found["steering.generation_tokens"] == receipt["tokens_steered"]


def test_spans_of_a_change(traced: Any, collector: Collector) -> None:
    digest = next(each.bundle for each in traced.admin.profiles() if each.name == "late")
    traced.admin.put_profile("other", ProfileSpec(bundle=digest, layers=(3,)))
    assert attributes(collector.wait_for("steering.stage"))["steering.program"] == f"{digest}+3"
    assert attributes(collector.wait_for("steering.activate"))["steering.program"] == f"{digest}+3"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_log_of_responses_and_messages(traced: Any, streamed: bool) -> None:
    bodies = {
        "responses": {"input": "What is 7 plus 5?", "max_output_tokens": 3},
        "messages": {"messages": [{"role": "user", "content": "What is 7 plus 5?"}], "max_tokens": 3},
    }
    for route, body in bodies.items():
        headers = {"x-request-id": f"{route}-{streamed}"}
        body = {"model": "lab@careful", "stream": streamed, **body}
        answer = traced.server.client.post(f"/v1/{route}", json=body, headers=headers)
        log = traced.server.log.read_text().splitlines()
        (line,) = [line for line in log if f"request_id={route}-{streamed} " in line]
        assert "profile=careful" in line and "outcome=ok" in line
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        steered = int(fields["prompt_tokens"]) + int(fields["generation_tokens"])
        assert f'"tokens_steered":{steered}' in answer.text


@pytest.mark.usefixtures("receipt")
def test_log_of_a_request(traced: Any) -> None:
    log = traced.server.log.read_text()
    line = next(line for line in log.splitlines() if f"request_id={REQUEST_ID}" in line)
    for field in ("profile=careful", "bundle=sha256:", "outcome=ok", "generation_tokens="):
        assert field in line
