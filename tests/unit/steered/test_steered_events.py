"""Receipts in responses and messages: streams of named events as vLLM writes them, with a fake engine behind."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import pytest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from server.profiles import Profile
from server.routes.answers.answer import BUNDLE_HEADER
from server.routes.answers.message import MessageAnswer
from server.routes.answers.response import ResponseAnswer

MakeReceipt = Callable[..., dict[str, Any]]


class Api(NamedTuple):
    """One of the two routes.

    Attributes:
        form: of its answers.
        route: path.
        whole: body of an answer.
        opening: events that name the model and come before the text.
        last: event that sums up.
        after: events after that.
    """

    form: Any
    route: str
    whole: dict[str, Any]
    opening: list[dict[str, Any]]
    last: dict[str, Any]
    after: list[dict[str, Any]]


RESPONSE = {"id": "resp_1", "object": "response", "model": "lab", "status": "completed", "output": ["é"]}
MESSAGE = {"id": "x", "type": "message", "model": "lab", "content": ["é"], "stop_reason": "end_turn"}
RESPONSES = Api(
    ResponseAnswer,
    "/v1/responses",
    RESPONSE,
    [
        {"type": "response.created", "response": {"model": "lab"}, "sequence_number": 0},
        {"type": "response.in_progress", "response": {"model": "lab"}, "sequence_number": 1},
    ],
    {"type": "response.completed", "response": RESPONSE, "sequence_number": 9},
    [],
)
MESSAGES = Api(
    MessageAnswer,
    "/v1/messages",
    MESSAGE,
    [{"type": "message_start", "message": {"model": "lab"}}],
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    [{"type": "message_stop"}],
)
DELTA = 'event: delta\ndata: {"text":  "event: message_delta \\n data: {}"}\n\n'
ERROR = 'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"boom"}}\n\n'


@pytest.fixture(params=[RESPONSES, MESSAGES], ids=["responses", "messages"])
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.param
    return found


@pytest.fixture
def rig(make_rig: Callable[..., Any], api: Api) -> Any:
    return make_rig(api.form, api.route)


def event(body: dict[str, Any]) -> str:
    return f"event: {body['type']}\ndata: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"


def body_of(chunk: str) -> dict[str, Any]:
    name, data, *rest = chunk.split("\n")
    assert rest == ["", ""]
    body: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {body['type']}"
    return body


def receipt_of(body: dict[str, Any]) -> Any:
    return body.get("response", body).get("steering")


def events(api: Api) -> list[str]:
    return [*map(event, api.opening), DELTA, event(api.last), *map(event, api.after)]


class Kept(BaseModel):
    """What vLLM keeps of a response, as far as it matters here."""

    model_config = ConfigDict(extra="allow")

    model: str = "lab"


async def test_the_event_that_sums_up_carries_the_receipt(rig: Any, api: Api, receipt: MakeReceipt) -> None:
    chunks = events(api)
    received = await rig.stream(*chunks, steering_profile="careful")
    place = len(api.opening) + 1
    assert received[:place] == chunks[:place], "events before it pass as they are"
    assert received[place + 1 :] == chunks[place + 1 :]
    found = body_of(received[place])
    assert receipt_of(found) == receipt(7)
    del found.get("response", found)["steering"]
    assert found == api.last
    assert rig.outcomes == {"ok": 1}
    assert rig.service.metrics.snapshot()["profiles"]["careful"]["tokens"] == {"prompt": 4, "generation": 3}


async def test_model_name_is_the_one_that_was_asked_for(rig: Any, api: Api, receipt: MakeReceipt) -> None:
    received = await rig.stream(*events(api), model="lab@careful")
    assert rig.asked == "lab"
    assert DELTA in received
    bodies = [body_of(chunk) for chunk in received if chunk != DELTA]
    named = [part for body in bodies for part in (body, *body.values()) if isinstance(part, dict) and "model" in part]
    assert [part["model"] for part in named] == ["lab@careful"] * (3 if api is RESPONSES else 1)
    assert [receipt_of(body) for body in bodies if receipt_of(body)] == [receipt(7)]


async def test_a_list_gets_a_list(rig: Any, api: Api) -> None:
    rig.counts = {"x": "3,4,2,0"}
    asked = [{"name": "medical", "strength": 0}, "careful", {"name": "medical", "scope": "prompt"}]
    received = await rig.stream(*events(api), steering_profile=asked)
    found = receipt_of(body_of(received[len(api.opening) + 1]))
    assert [(each["profile"], each["tokens_steered"]) for each in found] == [
        ("medical", 0),
        ("careful", 7),
        ("medical", 2),
    ]


async def test_missing_counts_end_in_an_error(rig: Any, api: Api) -> None:
    """Nothing that follows may make the answer look complete."""
    rig.counts = {}
    *passed, last = await rig.stream(*events(api), steering_profile="careful")
    assert passed == events(api)[: len(api.opening) + 1]
    body = body_of(last)
    assert body["type"] == "error"
    assert body["error"]["code"] == "steering_not_applied"
    if api is RESPONSES:
        assert (body["code"], body["sequence_number"]) == ("steering_not_applied", 9)
        assert body["message"] == body["error"]["message"]
    else:
        assert body["error"]["type"] == "api_error"
    assert rig.outcomes == {"failed": 1}
    assert rig.num_claims == 0


async def test_whole_answer(rig: Any, api: Api, careful: Profile, receipt: MakeReceipt) -> None:
    response = await rig.answer(JSONResponse(api.whole, headers={"x-request-id": "1"}), model="lab@careful")
    assert json.loads(response.body) == {**api.whole, "model": "lab@careful", "steering": receipt(7)}
    assert int(response.headers["content-length"]) == len(response.body)
    assert (response.headers[BUNDLE_HEADER], response.headers["x-request-id"]) == (careful.settings.bundle, "1")
    assert rig.outcomes == {"ok": 1}


async def test_whole_answer_without_counts(rig: Any, api: Api) -> None:
    rig.counts = {}
    response = await rig.answer(JSONResponse(api.whole), steering_profile="careful")
    assert response.status_code == 500
    assert json.loads(response.body)["error"]["code"] == "steering_not_applied"
    assert ("type" in json.loads(response.body)) == (api is MESSAGES)
    assert rig.outcomes == {"failed": 1}


async def test_an_error_in_the_stream_passes(rig: Any, api: Api) -> None:
    chunks = [*map(event, api.opening), DELTA, ERROR]
    assert await rig.stream(*chunks, steering_profile="careful") == chunks
    assert rig.outcomes == {"failed": 1}


async def test_an_answer_with_an_error_has_failed(rig: Any, api: Api) -> None:
    await rig.stream(ERROR, *events(api), steering_profile="careful")
    assert rig.outcomes == {"failed": 1}


async def test_a_stream_that_breaks_off_says_so(rig: Any, api: Api) -> None:
    async def break_off() -> AsyncIterator[str]:
        async with aclosing(generate()) as chunks:
            async for chunk in chunks:
                yield chunk
        raise RuntimeError("boom")

    generate, rig.generate = rig.generate, break_off
    chunks = [*map(event, api.opening), DELTA, event({"type": "delta", "sequence_number": 6})]
    received = await rig.stream(*chunks, steering_profile="careful")
    assert received[:-1] == chunks
    body = body_of(received[-1])
    assert body["type"] == "error" and body["error"]["code"] == "steering_not_applied"
    assert api is MESSAGES or body["sequence_number"] == 7
    assert rig.outcomes == {"failed": 1}


async def test_a_failed_response(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(ResponseAnswer, "/v1/responses")
    failed = {"type": "response.failed", "response": {"model": "lab", "status": "failed"}, "sequence_number": 2}
    (received,) = await rig.stream(event(failed), model="lab@careful")
    assert body_of(received)["response"] == {"model": "lab@careful", "status": "failed"}
    assert rig.outcomes == {"failed": 1}


async def test_comments_pass(rig: Any, api: Api) -> None:
    received = await rig.stream(": keep-alive\n\n", *events(api), "\n", model="lab@careful")
    assert (received[0], received[-1]) == (": keep-alive\n\n", "\n")


async def test_unsteered_requests_are_not_touched(rig: Any, api: Api) -> None:
    assert await rig.stream(*events(api)) == events(api)
    assert rig.request._seen == []
    response = JSONResponse(api.whole)
    assert await rig.answer(response) is response


async def test_closing_early_closes_the_engine_side(rig: Any, api: Api) -> None:
    rig.chunks = events(api)
    response = await rig.open(steering_profile="careful")
    assert await anext(response.body_iterator) == rig.chunks[0]
    assert len(rig.service.pins.keys) == 1
    await response.body_iterator.aclose()
    assert rig.closed
    rig.assert_over()
    assert rig.outcomes == {"aborted": 1}


async def test_cancelling_closes_the_engine_side(rig: Any) -> None:
    """What a disconnect does to the task that reads the stream."""
    rig.chunks = [DELTA] * 10_000
    response = await rig.open(steering_profile="careful")
    started = asyncio.Event()

    async def read() -> None:
        async for _ in response.body_iterator:
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.closed
    rig.assert_over()
    assert rig.outcomes == {"aborted": 1}


async def test_refusals_have_the_form_of_the_api(rig: Any, api: Api) -> None:
    response = await rig.open(steering_profile="x")
    body = json.loads(response.body)
    assert (response.status_code, body["error"]["code"]) == (404, "steering_profile_not_found")
    assert body["error"]["param"] == "steering_profile"
    if api is MESSAGES:
        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    else:
        assert body.keys() == {"error"} and body["error"]["type"] == "NotFoundError"
    assert rig.asked == "", "a refused request must not reach the engine"
    assert rig.service.metrics.snapshot()["refusals"]["steering_profile_not_found"] == 1


@pytest.mark.parametrize(
    ("reason", "stop", "num_claims"),
    [
        ("end_turn", None, 1),
        ("end_turn", ["."], 1),
        ("max_tokens", ["."], 1),
        ("stop_sequence", ["."], 0),
        ("tool_use", None, 1),
        # A stop string may have ended it all the same.
        ("tool_use", ["."], 0),
        # Aborted.
        (None, None, 0),
    ],
)
async def test_only_messages_that_the_engine_ended_are_checked(
    make_rig: Callable[..., Any], reason: str | None, stop: list[str] | None, num_claims: int
) -> None:
    rig = make_rig(MessageAnswer, "/v1/messages")
    delta = {"type": "message_delta", "delta": {"stop_reason": reason}}
    await rig.stream(event(delta), steering_profile="careful", stop_sequences=stop)
    assert rig.num_claims == num_claims
    await rig.answer(JSONResponse({**MESSAGE, "stop_reason": reason}), steering_profile="careful", stop_sequences=stop)
    assert rig.num_claims == 2 * num_claims


@pytest.mark.parametrize(("stop", "num_claims"), [((), 1), ((".",), 0)])
async def test_only_responses_without_stop_strings_are_checked(
    make_rig: Callable[..., Any], stop: tuple[str, ...], num_claims: int
) -> None:
    rig = make_rig(ResponseAnswer, "/v1/responses")
    await rig.stream(event(RESPONSES.last), steering_profile="careful", stop=stop)
    assert rig.num_claims == num_claims


async def test_what_vllm_keeps_of_a_response(make_rig: Callable[..., Any], receipt: MakeReceipt) -> None:
    rig = make_rig(ResponseAnswer, "/v1/responses")
    rig.kept["resp_1"] = Kept()
    await rig.answer(JSONResponse(RESPONSE), model="lab@careful")
    kept = rig.kept["resp_1"].model_dump()
    assert (kept["model"], kept["steering"]) == ("lab@careful", receipt(7))
    rig.kept["resp_1"] = Kept()
    await rig.stream(event(RESPONSES.last), steering_profile="careful")
    kept = rig.kept["resp_1"].model_dump()
    assert (kept["model"], kept["steering"]) == ("lab", receipt(7))


async def test_a_response_of_somebody_else_is_left_alone(make_rig: Callable[..., Any]) -> None:
    """A client may choose the id of a response; one that is not to be kept must not touch what was kept before."""
    rig = make_rig(ResponseAnswer, "/v1/responses")
    rig.kept["resp_1"] = kept = Kept()
    await rig.answer(JSONResponse(RESPONSE), steering_profile="careful", store=False)
    rig.counts = {}
    await rig.answer(JSONResponse(RESPONSE), steering_profile="careful", store=False)
    assert rig.kept == {"resp_1": kept}
    assert "steering" not in kept.model_dump()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_response_without_counts_is_not_kept(make_rig: Callable[..., Any], streamed: bool) -> None:
    rig = make_rig(ResponseAnswer, "/v1/responses")
    rig.counts = {}
    rig.kept["resp_1"] = Kept()
    if streamed:
        await rig.stream(event(RESPONSES.last), steering_profile="careful")
    else:
        await rig.answer(JSONResponse(RESPONSE), steering_profile="careful")
    assert rig.kept == {}
