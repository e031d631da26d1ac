"""Token counts on their way back."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.compat import IncompatibleVllmError
from server.engine.receipts import TOKENS_HEADER, Receipts


class Processor:
    """vLLM's output processor, as far as receipts see it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.request_states = {request_id: object() for request_id in ("0_x", "1_x", "x")}

    def process_outputs(self, engine_core_outputs: list[Any], timestamp: float = 0.0, stats: Any = None) -> str:
        self.calls.append((engine_core_outputs, timestamp, stats))
        return "processed"


@pytest.fixture
def processor() -> Processor:
    return Processor()


@pytest.fixture
def receipts(processor: Processor) -> Receipts:
    receipts = Receipts()
    receipts.attach(SimpleNamespace(output_processor=processor))
    return receipts


def output(request_id: str, value: str | None) -> Any:
    return SimpleNamespace(request_id=request_id, trace_headers=None if value is None else {TOKENS_HEADER: value})


def test_latest_counts_by_request_and_term(receipts: Receipts, processor: Processor) -> None:
    with receipts.expect("one") as counts:
        assert counts == {}
        processor.process_outputs([output("0_x", "one:3,0"), output("1_x", "one:4,1"), output("y", "two:9")])
        processor.process_outputs([output("0_x", "one:5,2"), output("1_x", None)])
        assert counts == {"0_x": [5, 2], "1_x": [4, 1]}


def test_ids_may_hold_colons(receipts: Receipts, processor: Processor) -> None:
    with receipts.expect("self-test:0") as counts:
        processor.process_outputs([output("x", "self-test:0:7,1")])
        assert counts == {"x": [7, 1]}


def test_counts_are_noted_before_the_consumer_sees_the_output() -> None:
    receipts = Receipts()
    seen = []

    def process_outputs(engine_core_outputs: list[Any]) -> None:
        seen.append(dict(counts))

    processor = SimpleNamespace(process_outputs=process_outputs, request_states={"x": object()})
    receipts.attach(SimpleNamespace(output_processor=processor))
    with receipts.expect("one") as counts:
        processor.process_outputs([output("x", "one:1")])
    assert seen == [{"x": [1]}]


def test_counts_end_with_the_answer(receipts: Receipts, processor: Processor) -> None:
    """vLLM forgets a request with its stop string, while engine core runs on until the abort reaches it."""
    with receipts.expect("one") as counts:
        processor.process_outputs([output("x", "one:7")])
        del processor.request_states["x"]
        processor.process_outputs([output("x", "one:8")])
        assert counts == {"x": [7]}


def test_the_call_is_passed_on(receipts: Receipts, processor: Processor) -> None:
    outputs = [output("x", "one:1")]
    with receipts.expect("one"):
        assert processor.process_outputs(outputs, 2.5, stats="s") == "processed"
    assert processor.process_outputs(outputs) == "processed"
    assert processor.calls == [(outputs, 2.5, "s"), (outputs, 0.0, None)]


def test_nothing_is_kept(receipts: Receipts, processor: Processor) -> None:
    with receipts.expect("one") as counts:
        pass
    processor.process_outputs([output("x", "one:1")])
    assert counts == {}
    with pytest.raises(RuntimeError), receipts.expect("two"):
        raise RuntimeError
    assert receipts._counts == {}


def test_other_headers(receipts: Receipts, processor: Processor) -> None:
    traced = SimpleNamespace(request_id="x", trace_headers={"traceparent": "00-ab-cd-01"})
    with receipts.expect("one") as counts:
        processor.process_outputs([traced])
    assert counts == {}


def test_another_vllm() -> None:
    processor = SimpleNamespace(process_outputs=lambda outputs: None)
    with pytest.raises(IncompatibleVllmError, match="engine_core_outputs"):
        Receipts().attach(SimpleNamespace(output_processor=processor))
