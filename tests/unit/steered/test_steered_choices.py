"""Receipts in answers of choices: streams as vLLM writes them, with a fake engine behind."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from server.auth.keys import ANONYMOUS
from server.profiles import Profile
from server.routes.answers.answer import BUNDLE_HEADER
from server.routes.answers.choices import ChoicesAnswer
from server.schema import ProfileRef

MakeReceipt = Callable[..., dict[str, Any]]

DONE = "data: [DONE]\n\n"
COMMENT = ": keep-alive\n\n"
ERROR = 'data: {"error":{"message":"boom","type":"InternalServerError","param":null,"code":500}}\n\n'
USAGE = 'data: {"id":"x","model":"lab","choices":[],"usage":{"total_tokens":9}}\n\n'


@pytest.fixture
def rig(make_rig: Callable[..., Any]) -> Any:
    return make_rig(ChoicesAnswer, "/v1/chat/completions")


def text(content: str, index: int = 0, finish: str | None = None) -> str:
    choice = {"index": index, "delta": {"content": content}, "finish_reason": finish}
    body = {"id": "x", "model": "lab", "choices": [choice]}
    return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"


def body_of(chunk: str) -> dict[str, Any]:
    assert chunk.startswith("data: ") and chunk.endswith("\n\n")
    return json.loads(chunk.removeprefix("data: "))


def with_receipt(chunk: str, value: Any) -> dict[str, Any]:
    return {**body_of(chunk), "steering": value}


async def test_last_chunk_carries_the_receipt(rig: Any, receipt: MakeReceipt) -> None:
    chunks = [text(""), text('é "finish_reason": "stop"'), text("", finish="stop")]
    *passed, last, done = await rig.stream(*chunks, DONE, steering_profile="careful")
    assert passed == chunks[:-1], "chunks before the last pass as they are"
    assert body_of(last) == with_receipt(chunks[-1], receipt(7))
    assert done == DONE
    assert rig.outcomes == {"ok": 1}
    assert rig.service.metrics.snapshot()["profiles"]["careful"]["tokens"] == {"prompt": 4, "generation": 3}


async def test_usage_chunk_is_the_last(rig: Any, receipt: MakeReceipt) -> None:
    chunks = [text("a"), text("", finish="length"), USAGE]
    first, finish, last, done = await rig.stream(*chunks, DONE, steering_profile="careful")
    assert (first, done) == (chunks[0], DONE)
    assert body_of(finish) == body_of(chunks[1]), "one receipt only"
    assert body_of(last) == with_receipt(USAGE, receipt(7))


async def test_choices_are_counted_together(rig: Any, receipt: MakeReceipt) -> None:
    rig.counts = {"0_cmpl": "7,0", "1_cmpl": "2,7"}
    chunks = [text("a", 0), text("b", 1), text("", 1, "stop"), text("c", 0), text("", 0, "stop")]
    received = await rig.stream(*chunks, DONE, steering_profile="careful")
    assert [body_of(chunk) for chunk in received[:4]] == [body_of(chunk) for chunk in chunks[:4]]
    assert body_of(received[4]) == with_receipt(chunks[4], receipt(16))


async def test_several_profiles(rig: Any, careful: Profile) -> None:
    rig.counts = {"cmpl": "3,4,2,0"}
    asked = [{"name": "medical", "strength": 0}, "careful", {"name": "medical", "scope": "prompt"}]
    *_, last, _ = await rig.stream(text("", finish="stop"), DONE, steering_profile=asked)
    found = body_of(last)["steering"]
    assert [entry["tokens_steered"] for entry in found] == [0, 7, 2]
    assert [entry["profile"] for entry in found] == ["medical", "careful", "medical"]


@pytest.mark.parametrize("before", [[text("a")], [text("a"), text("", finish="stop")]], ids=["early", "after-finish"])
async def test_an_error_in_the_stream_passes(rig: Any, before: list[str]) -> None:
    received = await rig.stream(*before, ERROR, DONE, steering_profile="careful")
    assert received[-2:] == [ERROR, DONE]
    assert rig.outcomes == {"failed": 1}
    assert [body_of(chunk) for chunk in received[:-2]] == [body_of(chunk) for chunk in before], "no receipt"


async def test_comments_pass_at_once(rig: Any, receipt: MakeReceipt) -> None:
    finish = text("", finish="stop")
    received = await rig.stream(COMMENT, text("a"), finish, COMMENT, DONE, steering_profile="careful")
    assert received[:3] == [COMMENT, text("a"), COMMENT]
    assert body_of(received[3]) == with_receipt(finish, receipt(7))


async def test_a_stream_without_done(rig: Any, receipt: MakeReceipt) -> None:
    finish = text("", finish="stop")
    *_, last = await rig.stream(text("a"), finish, steering_profile="careful")
    assert body_of(last) == with_receipt(finish, receipt(7))


@pytest.mark.parametrize("usage", [[], [USAGE]])
async def test_missing_counts_end_in_an_error(rig: Any, usage: list[str]) -> None:
    rig.counts = {}
    received = await rig.stream(text("a"), text("", finish="stop"), *usage, DONE, steering_profile="careful")
    error = body_of(received[-2])["error"]
    assert (error["code"], error["type"]) == ("steering_not_applied", "InternalServerError")
    assert received[-1] == DONE
    assert not any("steering" in body_of(chunk) for chunk in received[:-1])


async def test_model_name_is_the_one_that_was_asked_for(rig: Any, receipt: MakeReceipt) -> None:
    chunks = [text("a"), COMMENT, text("", finish="stop"), USAGE, DONE]
    received = await rig.stream(*chunks, model="lab@careful")
    assert rig.asked == "lab"
    bodies = [body_of(chunk) for chunk in received if chunk.startswith("data: {")]
    assert [body["model"] for body in bodies] == ["lab@careful"] * 3
    assert bodies[-1]["steering"] == receipt(7)


async def test_headers(rig: Any, careful: Profile) -> None:
    response = await rig.open(steering_profile="careful")
    assert response.headers[BUNDLE_HEADER] == careful.settings.bundle
    assert response.headers["x-request-id"] == "1"
    await response.body_iterator.aclose()


async def test_closing_early_closes_the_engine_side(rig: Any) -> None:
    rig.chunks = [text("a"), text("b"), text("", finish="stop"), DONE]
    response = await rig.open(steering_profile="careful")
    assert await anext(response.body_iterator) == text("a")
    assert len(rig.receipts._counts) == 1
    assert rig.service.pins.keys == {rig.service.profiles.get("careful").settings.key}
    await response.body_iterator.aclose()
    assert rig.closed
    rig.assert_over()
    assert rig.outcomes == {"aborted": 1}


async def test_a_stream_that_nobody_reads(rig: Any) -> None:
    rig.chunks = [text("a"), text("", finish="stop"), DONE]
    response = await rig.open(steering_profile="careful")
    assert len(rig.service.pins.keys) == 1
    del response
    rig.assert_over()
    assert rig.outcomes == {"aborted": 1}


async def test_cancelling_closes_the_engine_side(rig: Any) -> None:
    """What a disconnect does to the task that reads the stream."""
    rig.chunks = [text("a")] * 10_000
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


async def test_failing_engine_leaves_nothing(rig: Any) -> None:
    class Broken(list[str]):
        def __iter__(self) -> Any:
            yield text("a")
            raise RuntimeError("dead")

    rig.chunks = Broken()
    response = await rig.open(steering_profile="careful")
    with pytest.raises(RuntimeError, match="dead"):
        _ = [chunk async for chunk in response.body_iterator]
    assert rig.closed
    rig.assert_over()
    assert rig.outcomes == {"failed": 1}


@pytest.mark.parametrize(("reason", "num_claims"), [(None, 1), (7, 1), (".", 0)], ids=["end", "token", "string"])
async def test_only_answers_that_the_engine_ended_are_checked(rig: Any, reason: Any, num_claims: int) -> None:
    """At a stop string, the workers may have gone on."""
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": reason}
    await rig.stream(f"data: {json.dumps({'choices': [choice]})}\n\n", DONE, steering_profile="careful")
    assert rig.num_claims == num_claims
    await rig.answer(JSONResponse({"choices": [choice]}), steering_profile="careful")
    assert rig.num_claims == 2 * num_claims


async def test_strength_zero_runs_unsteered_with_a_receipt(rig: Any, receipt: MakeReceipt) -> None:
    off = {"name": "careful", "strength": 0}
    finish = text("", finish="stop")
    *_, last, _ = await rig.stream(text("a"), finish, DONE, steering_profile=off)
    assert rig.request._seen == [None]
    assert body_of(last) == with_receipt(finish, receipt(0, strength=0.0))


async def test_unsteered_requests_are_not_touched(rig: Any) -> None:
    chunks = [text("a"), text("", finish="stop"), USAGE, DONE]
    assert await rig.stream(*chunks) == chunks
    assert rig.request._seen == []
    assert BUNDLE_HEADER not in (await rig.open()).headers


async def test_whole_answer(rig: Any, careful: Profile, receipt: MakeReceipt) -> None:
    content = {"id": "x", "model": "lab", "choices": [{"finish_reason": "stop"}]}
    response = await rig.answer(JSONResponse(content, headers={"x-request-id": "1"}), model="lab@careful")
    assert json.loads(response.body) == {**content, "model": "lab@careful", "steering": receipt(7)}
    assert int(response.headers["content-length"]) == len(response.body)
    assert (response.headers[BUNDLE_HEADER], response.headers["x-request-id"]) == (careful.settings.bundle, "1")


async def test_whole_answer_without_counts(rig: Any) -> None:
    rig.counts = {}
    response = await rig.answer(JSONResponse({"choices": []}), steering_profile="careful")
    assert response.status_code == 500
    assert json.loads(response.body)["error"]["code"] == "steering_not_applied"


async def test_errors_and_disconnects_pass(rig: Any) -> None:
    refused = JSONResponse({"error": {}}, status_code=400)
    assert await rig.answer(refused, steering_profile="careful") is refused
    assert rig.outcomes == {"refused": 1}
    assert await rig.answer(None, steering_profile="careful") is None
    assert rig.outcomes == {"refused": 1, "aborted": 1}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"steering_profile": "x"}, 404, "steering_profile_not_found", "steering_profile"),
        ({"model": "lab@x"}, 404, "steering_profile_not_found", "steering_profile"),
        ({"model": "lab@"}, 404, "steering_profile_not_found", "steering_profile"),
        ({"model": "lab@careful", "steering_profile": "careful"}, 400, "steering_profile_conflict", "model"),
        ({"steering_profile": "careful", "unsteerable_field": "xyz"}, 400, "steering_unsupported", "xyz"),
        (
            {"steering_profile": {"name": "careful", "strength": 9}},
            400,
            "steering_strength_invalid",
            "steering_profile",
        ),
        ({"steering_profile": ["careful"] * 5}, 400, "steering_strength_invalid", "steering_profile"),
    ],
)
async def test_refusals(rig: Any, fields: dict[str, Any], status: int, code: str, param: str) -> None:
    response = await rig.open(**fields)
    error = json.loads(response.body)["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert rig.asked == "", "a refused request must not reach the engine"
    assert rig.service.metrics.snapshot()["refusals"][code] == 1
    asked = "careful" in str(fields)
    assert rig.outcomes == ({"refused": 1} if asked else {})


@pytest.mark.parametrize("model", [None, "lab", "lab-2", "other@careful", "labs"])
async def test_other_model_names_are_left_to_vllm(rig: Any, model: str | None) -> None:
    await rig.stream(DONE, model=model)
    assert rig.asked == model


def test_profile_in_the_model_name_with_a_version(rig: Any, careful: Profile) -> None:
    request = rig.request.model_copy(update={"model": f"lab-2@careful@{careful.settings.bundle}"})
    resolved = rig.service.admit(request, ANONYMOUS)
    assert resolved is not None and resolved.terms[0].profile is careful
    assert request.model == "lab-2"
    assert rig.service.profiles.resolve([ProfileRef(name="careful")], ANONYMOUS).terms == resolved.terms
