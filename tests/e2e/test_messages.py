"""`/v1/messages`: steered as the same chat completion is, streamed or not, with a receipt."""

import json
from typing import Any

import anthropic
import pytest

from artifacts.bundle import Bundle

pytestmark = pytest.mark.engine

PATH, COUNT_PATH = "/v1/messages", "/v1/messages/count_tokens"
QUESTION = "What is 7 plus 5?"
CONVERSATION = [{"role": "user", "content": QUESTION}]
BODY = {"model": "lab", "messages": CONVERSATION, "temperature": 0, "max_tokens": 12}
SCOPES = ["all", "prompt", "response", "generation"]
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def send(server: Any, streamed: bool = False, **fields: Any) -> dict[str, Any]:
    """A message, which must succeed; of a stream, the message that its events make up."""
    body = {**BODY, **fields}
    if not streamed:
        response = server.post(PATH, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer
    events = server.events(PATH, body)
    start, (delta,) = events[0], [event for event in events if event["type"] == "message_delta"]
    assert [start["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    assert all("steering" not in event for event in events if event is not delta)
    text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    # Only a stream names what is null.
    end = {key: value for key, value in delta.items() if key != "type"} | delta["delta"]
    answer = {**start["message"], **end, "content": [{"type": "text", "text": text}]}
    del answer["delta"]
    return {key: value for key, value in answer.items() if value is not None}


def text_of(answer: dict[str, Any]) -> str:
    (part,) = answer["content"]
    text: str = part["text"]
    return text


def lasting(answer: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common: not their id, nor what came from the cache."""
    usage = answer["usage"]
    num_input = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    return {**answer, "id": None, "usage": (num_input, usage["output_tokens"])}


@STREAMED
@pytest.mark.parametrize("scope", SCOPES)
def test_equal_to_the_chat_completion(eager: Any, scope: str, streamed: bool) -> None:
    profile = {"name": "every", "strength": -3, "scope": scope}
    answer = send(eager, streamed, steering_profile=profile)
    chat = eager.chat(QUESTION, max_tokens=12, steering_profile=profile)
    assert text_of(answer) == chat["choices"][0]["message"]["content"] != text_of(send(eager))
    assert answer["steering"] == chat["steering"]
    assert lasting(answer)["usage"] == (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])


def test_everything_of_a_request_reaches_the_chat_completion(eager: Any) -> None:
    """Fields beyond the conversation go the same way as without steering."""
    fields = {"system": "You are a drunk sailor.", "stop_sequences": ["."], "top_k": 1, "temperature": 1.0}
    messages = [*CONVERSATION, {"role": "assistant", "content": "12."}, {"role": "user", "content": "3 plus 5?"}]
    answer = send(eager, messages=messages, **fields, steering_profile="early")
    messages = [{"role": "system", "content": fields["system"]}, *messages]
    body = {"model": "lab", "messages": messages, "max_tokens": 12, "stop": ["."], "top_k": 1, "temperature": 1.0}
    chat = eager.post("/v1/chat/completions", {**body, "steering_profile": "early"}).json()
    assert text_of(answer) == (chat["choices"][0]["message"]["content"] or "")
    assert (answer["stop_reason"], answer.get("stop_sequence")) == ("stop_sequence", ".")
    assert answer["steering"] == chat["steering"]


def test_a_structured_answer(eager: Any) -> None:
    output = {"format": {"type": "json_schema", "schema": {"enum": ["eleven", "twelve"]}}}
    answer = send(eager, output_config=output, steering_profile="careful")
    assert json.loads(text_of(answer)) in ("eleven", "twelve")
    assert answer["steering"]["tokens_steered"] > 0


def test_streaming_changes_nothing(eager: Any) -> None:
    for fields in ({"model": "lab@careful"}, {"steering_profile": ["early", {"name": "late", "strength": 0}]}):
        assert lasting(send(eager, True, **fields)) == lasting(send(eager, False, **fields))


@STREAMED
def test_every_way_to_name_a_profile(eager: Any, bundles: dict[str, Bundle], streamed: bool) -> None:
    digest = bundles["careful"].digest
    by_name = send(eager, streamed, model="lab@careful")
    assert text_of(by_name) == "7 plus 5 is 12."
    assert (by_name["model"], by_name["steering"]["bundle"]) == ("lab@careful", digest)
    for profile in ("careful", f"careful@{digest}", {"name": "careful"}, ["careful"]):
        answer = send(eager, streamed, steering_profile=profile)
        assert (answer["model"], text_of(answer)) == ("lab", text_of(by_name))
        assert answer["steering"] == ([by_name["steering"]] if isinstance(profile, list) else by_name["steering"])
    off = send(eager, streamed, steering_profile={"name": "careful", "strength": 0})
    assert text_of(off) == text_of(send(eager, streamed)) != text_of(by_name)
    assert (off["steering"]["strength"], off["steering"]["tokens_steered"]) == (0.0, 0)


@STREAMED
def test_header(eager: Any, bundles: dict[str, Bundle], streamed: bool) -> None:
    response = eager.post(PATH, {**BODY, "stream": streamed, "steering_profile": ["early", "careful"]})
    assert response.headers["x-steering-bundle"] == f"{bundles['early'].digest}, {bundles['careful'].digest}"
    assert "x-steering-bundle" not in eager.post(PATH, {**BODY, "stream": streamed}).headers


@STREAMED
def test_an_unsteered_message_is_as_vllm_gives_it(eager: Any, plain: Any, streamed: bool) -> None:
    fields: list[dict[str, Any]] = [
        {},
        {"system": [{"type": "text", "text": "Be brief."}], "max_tokens": 2},
        {"steering_profile": None, "stop_sequences": ["."], "metadata": {"steering_profile": "careful"}},
    ]
    for each in fields:
        ours = lasting(send(eager, streamed, **each))
        assert "steering" not in ours
        each.pop("steering_profile", None)
        assert ours == lasting(send(plain, streamed, **each))


def test_errors_are_vllms_own(eager: Any, plain: Any) -> None:
    for fields in ({"temperature": -1}, {"max_tokens": 100_000}, {"model": "other"}, {"messages": 7}):
        ours = eager.post(PATH, {**BODY, "steering_profile": "careful", **fields})
        theirs = plain.post(PATH, {**BODY, **fields})
        assert 400 <= ours.status_code == theirs.status_code < 500
        assert ours.json() == theirs.json()
        assert "x-steering-bundle" not in ours.headers


@STREAMED
def test_a_stop_sequence(eager: Any, streamed: bool) -> None:
    answer = send(eager, streamed, stop_sequences=[" is"], steering_profile="careful")
    assert (text_of(answer), answer["stop_reason"]) == ("7 plus 5", "stop_sequence")
    assert answer["steering"]["tokens_steered"] == sum(lasting(answer)["usage"]) - 1


def test_counting_tokens(eager: Any, plain: Any) -> None:
    body = {"model": "lab", "messages": CONVERSATION}
    expected = plain.post(COUNT_PATH, body).json()
    assert expected["input_tokens"] == eager.chat(QUESTION)["usage"]["prompt_tokens"]
    for model in ("lab", "lab@careful"):
        assert eager.post(COUNT_PATH, {**body, "model": model}).json() == expected
    unknown = eager.post(COUNT_PATH, {**body, "model": "lab@carefull"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "steering_profile_not_found")
    field = eager.post(COUNT_PATH, {**body, "steering_profile": "careful"})
    assert (field.status_code, field.json()["error"]["code"]) == (400, "steering_unsupported")
    assert unknown.json()["type"] == field.json()["type"] == "error"


def test_metrics(eager: Any) -> None:
    def counted(outcome: str) -> float:
        return float(eager.metric("steering_requests_total", profile="late", outcome=outcome))

    ok, refused = counted("ok"), counted("refused")
    send(eager, steering_profile="late")
    send(eager, True, model="lab@late")
    assert eager.post(PATH, {**BODY, "model": "lab@late", "steering_profile": "late"}).status_code == 400
    assert eager.post(PATH, {**BODY, "temperature": -1, "model": "lab@late"}).status_code == 400
    assert (counted("ok"), counted("refused")) == (ok + 2, refused + 2)


def test_anthropic_client(eager: Any, bundles: dict[str, Bundle]) -> None:
    with anthropic.Anthropic(base_url=eager.url, api_key="none", max_retries=0) as client:
        options: Any = {"messages": CONVERSATION, "max_tokens": 16}
        choices: list[Any] = [
            {"model": "lab", "extra_body": {"steering_profile": "careful", "temperature": 0}},
            {"model": "lab@careful", "extra_body": {"temperature": 0}},
        ]
        for choice in choices:
            whole = client.messages.create(**choice, **options)
            assert whole.content[0].text == "7 plus 5 is 12."
            receipt = whole.to_dict()["steering"]
            assert receipt["bundle"] == bundles["careful"].digest
            events = list(client.messages.create(**choice, **options, stream=True))
            (delta,) = [event for event in events if event.type == "message_delta"]
            assert delta.to_dict()["steering"] == receipt
            with client.messages.stream(**choice, **options) as stream:
                final = stream.get_final_message()
            assert (final.content[0].text, final.model) == (whole.content[0].text, choice["model"])
        assert client.messages.count_tokens(model="lab@careful", messages=options["messages"]).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(model="lab@carefull", **options)
        assert unknown.value.body["error"]["code"] == "steering_profile_not_found"
        assert unknown.value.type == "not_found_error"
        with pytest.raises(anthropic.BadRequestError) as misspelt:
            client.messages.create(model="lab", extra_body={"steering_profle": "careful"}, **options)
        assert misspelt.value.body["error"]["code"] == "steering_field_unknown"
        assert misspelt.value.type == "invalid_request_error"
