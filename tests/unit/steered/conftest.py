"""A fake engine behind `respond`: it answers as vLLM's routes do, and its workers report counts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from pydantic import PrivateAttr

from server.auth.keys import ANONYMOUS
from server.auth.middleware import IDENTITY
from server.engine.receipts import TOKENS_HEADER, Receipts
from server.engine.steering import Steering
from server.profiles import Profile, ProfileTable
from server.routes.answers.answer import Answer
from server.routes.steered import respond
from server.schema import SteeringFields, Unsteerable
from server.service import SteeringService


class Request(SteeringFields):
    """What the routes hand over."""

    model: str | None = "lab"
    unsteerable_field: str | None = None
    request_id: str = "resp_1"
    store: bool = True
    stop: tuple[str, ...] = ()
    stop_sequences: list[str] | None = None

    def unsteerable(self) -> Unsteerable | None:
        field = self.unsteerable_field
        return None if field is None else Unsteerable(field, f"the {field}")

    def steer_with(self, steering: Steering | None) -> None:
        self._seen.append(steering)

    _seen: list[Steering | None] = PrivateAttr(default_factory=list)


class Rig:
    """A service with two profiles, an endpoint that answers with given chunks, and workers that report counts.

    Attributes:
        form: of the answers.
        kept: vLLM's store of responses.
    """

    def __init__(self, form: type[Answer], route: str, table: ProfileTable, make_service: Any) -> None:
        self.form = form
        self.processor = SimpleNamespace(process_outputs=lambda engine_core_outputs: None, request_states={})
        self.receipts = Receipts()
        self.receipts.attach(SimpleNamespace(output_processor=self.processor))
        engine: Any = SimpleNamespace(receipts=self.receipts)
        self.service: SteeringService = make_service(table, engine, ("lab", "lab-2"))
        self.kept: dict[str, Any] = {}
        state = SimpleNamespace(
            steering=self.service, openai_serving_responses=SimpleNamespace(response_store=self.kept)
        )
        self.raw_request: Any = SimpleNamespace(
            app=SimpleNamespace(state=state),
            scope={"path": f"/gateway{route}", "root_path": "/gateway", "state": {IDENTITY: ANONYMOUS}},
            headers={},
        )
        self.request = Request()
        self.asked = ""
        self.chunks: list[str] = []
        self.counts: dict[str, str] = {"cmpl-0": "4,3"}
        self.closed = False

    def report(self) -> None:
        """What arrives from the workers while the engine runs."""
        self.processor.request_states.update(self.counts)
        for steering in self.request._seen:
            for request_id, counts in self.counts.items() if steering else ():
                headers = {TOKENS_HEADER: f"{steering.request_id}:{counts}"}
                self.processor.process_outputs([SimpleNamespace(request_id=request_id, trace_headers=headers)])

    async def generate(self) -> AsyncIterator[str]:
        try:
            for chunk in self.chunks:
                await asyncio.sleep(0)
                self.report()
                yield chunk
        finally:
            self.closed = True

    async def stream_endpoint(self, request: Any, raw_request: Any) -> StreamingResponse:
        self.asked = request.model
        return StreamingResponse(self.generate(), media_type="text/event-stream", headers={"x-request-id": "1"})

    async def open(self, **fields: Any) -> Any:
        self.request = Request(**fields)
        return await respond(self.request, self.raw_request, self.stream_endpoint, self.form)

    async def stream(self, *chunks: str, **fields: Any) -> list[str]:
        """Chunks that the client gets; nothing may be left behind."""
        self.chunks = list(chunks)
        response = await self.open(**fields)
        received = [chunk async for chunk in response.body_iterator]
        self.assert_over()
        assert self.closed
        return received

    def assert_over(self) -> None:
        """No request is under way, and none has left anything behind."""
        assert self.receipts._counts == {}
        assert self.service.pins.keys == frozenset()
        assert all(each["active"] == 0 for each in self.service.metrics.snapshot()["profiles"].values())

    @property
    def outcomes(self) -> dict[str, int]:
        """Requests that ended, by how they did."""
        counts: dict[str, int] = self.service.metrics.snapshot()["profiles"]["careful"]["requests"]
        return {outcome: number for outcome, number in counts.items() if number}

    @property
    def num_claims(self) -> int:
        """Receipts that wait to be held against the workers' own counts."""
        return len(self.service.metrics.receipts._pending)

    async def answer(self, response: Any, **fields: Any) -> Any:
        """Answer to a request without streaming."""

        async def endpoint(request: Any, raw_request: Any) -> Any:
            self.asked = request.model
            self.report()
            return response

        self.request = Request(**fields)
        result = await respond(self.request, self.raw_request, endpoint, self.form)
        self.assert_over()
        return result


@pytest.fixture
def careful(make_profile: Callable[..., Profile]) -> Profile:
    return make_profile("careful", (1, 3))


@pytest.fixture
def make_rig(
    careful: Profile,
    make_profile: Callable[..., Profile],
    table_of: Callable[..., ProfileTable],
    make_service: Callable[..., SteeringService],
) -> Callable[[type[Answer], str], Rig]:
    """Rig for a form of answers at a route."""

    def make(form: type[Answer], route: str) -> Rig:
        rig = Rig(form, route, table_of(careful, make_profile("medical")), make_service)
        rig.service.metrics.register(["careful", "medical"])
        return rig

    return make


@pytest.fixture
def receipt(careful: Profile) -> Callable[..., dict[str, Any]]:
    """Receipt of `careful` for so many tokens."""

    def make(tokens: int, **changes: Any) -> dict[str, Any]:
        fields = {
            "profile": "careful",
            "bundle": careful.settings.bundle,
            "strength": 0.5,
            "scope": "all",
            "layers": [1, 3],
        }
        return {**fields, "tokens_steered": tokens, **changes}

    return make
