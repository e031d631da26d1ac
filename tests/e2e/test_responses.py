"""`/v1/responses`: steered as the same tokens of a completion are, streamed or not, with a receipt."""

from typing import Any

import openai
import pytest

from artifacts.bundle import Bundle

pytestmark = pytest.mark.engine

PATH = "/v1/responses"
QUESTION = "What is 7 plus 5?"
BODY = {"model": "lab", "input": QUESTION, "temperature": 0, "max_output_tokens": 12}
# The closest that two requests of one server come, which may share a batch with others.
TOLERANCE = 2e-3
SCOPES = ["all", "prompt", "response", "generation"]
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def send(server: Any, streamed: bool = False, **fields: Any) -> dict[str, Any]:
    """A response, which must succeed."""
    body = {**BODY, **fields}
    if not streamed:
        response = server.post(PATH, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer
    *earlier, last = server.events(PATH, body)
    assert last["type"] == "response.completed"
    assert not any("steering" in event.get("response", {}) for event in earlier)
    answer = last["response"]
    deltas = [event["delta"] for event in earlier if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(answer)
    return answer


def text_of(answer: dict[str, Any]) -> str:
    (message,) = answer["output"]
    return "".join(part["text"] for part in message["content"])


def lasting(answer: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    output = [{key: value for key, value in item.items() if key != "id"} for item in answer["output"]]
    usage = {**answer["usage"], "input_tokens_details": None}
    return {**answer, "id": None, "created_at": None, "usage": usage, "output": output}


def expected_tokens(scope: str, usage: dict[str, Any]) -> int:
    """Tokens that one request feeds through the model under a scope; its last answer token is never fed back."""
    prompt, answer = usage["input_tokens"], usage["output_tokens"]
    return {"all": prompt + answer - 1, "prompt": prompt, "response": answer, "generation": answer - 1}[scope]


@STREAMED
@pytest.mark.parametrize("scope", SCOPES)
def test_equal_to_a_completion_of_the_same_tokens(eager: Any, scope: str, streamed: bool) -> None:
    profile = {"name": "every", "strength": -3, "scope": scope}
    fields = {"ignore_eos": True, "enable_response_messages": True, "top_logprobs": 5}
    fields |= {"include": ["message.output_text.logprobs"], "steering_profile": profile}
    answer = send(eager, streamed, **fields)
    prompt, said = answer["input_messages"][0]["tokens"], answer["output_messages"][0]["tokens"]
    same = eager.complete(prompt, max_tokens=12, ignore_eos=True, logprobs=5, steering_profile=profile)
    assert said == same["choices"][0]["token_ids"]
    assert said != eager.complete(prompt, max_tokens=12, ignore_eos=True)["choices"][0]["token_ids"]
    assert answer["steering"] == same["steering"]
    assert answer["steering"]["tokens_steered"] == expected_tokens(scope, answer["usage"])
    if not streamed:
        logprobs = [each["logprob"] for each in answer["output"][0]["content"][0]["logprobs"]]
        assert logprobs == pytest.approx(same["choices"][0]["logprobs"]["token_logprobs"], abs=TOLERANCE)


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


def test_every_event_with_a_model_has_the_name_that_was_asked_for(eager: Any) -> None:
    responses = [
        event["response"] for event in eager.events(PATH, {**BODY, "model": "lab@careful"}) if "response" in event
    ]
    assert [response["model"] for response in responses] == ["lab@careful"] * 3


@STREAMED
def test_header(eager: Any, bundles: dict[str, Bundle], streamed: bool) -> None:
    response = eager.post(PATH, {**BODY, "stream": streamed, "steering_profile": ["early", "careful"]})
    assert response.headers["x-steering-bundle"] == f"{bundles['early'].digest}, {bundles['careful'].digest}"
    assert "x-steering-bundle" not in eager.post(PATH, {**BODY, "stream": streamed}).headers


@STREAMED
def test_an_unsteered_response_is_as_vllm_gives_it(eager: Any, plain: Any, streamed: bool) -> None:
    fields: list[dict[str, Any]] = [
        {},
        {"instructions": "Be brief.", "input": [{"role": "user", "content": QUESTION}], "max_output_tokens": 2},
        {"steering_profile": None, "text": {"format": {"type": "text"}}, "metadata": {"steering_profile": "careful"}},
    ]
    for each in fields:
        ours = lasting(send(eager, streamed, **each))
        assert "steering" not in ours
        each.pop("steering_profile", None)
        assert ours == lasting(send(plain, streamed, **each))


def test_errors_are_vllms_own(eager: Any, plain: Any) -> None:
    for fields in ({"temperature": -1}, {"input": "x " * 2000}, {"previous_response_id": "resp_none"}, {"input": 7}):
        ours = eager.post(PATH, {**BODY, **fields, "steering_profile": "careful"})
        theirs = plain.post(PATH, {**BODY, **fields})
        assert 400 <= ours.status_code == theirs.status_code < 500
        assert ours.json() == theirs.json()
        assert "x-steering-bundle" not in ours.headers


@STREAMED
def test_a_stop_string(eager: Any, streamed: bool) -> None:
    answer = send(eager, streamed, stop=[" is"], steering_profile="careful")
    assert text_of(answer) == "7 plus 5"
    assert answer["steering"]["tokens_steered"] == expected_tokens("all", answer["usage"])


def test_what_cannot_be_steered_is_refused(eager: Any) -> None:
    tools = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    mcp = [{"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:9/mcp"}]
    for field, fields in {
        "background": [{"background": True}, {"background": True, "stream": True}],
        "tools": [{"tools": tools}, {"tools": mcp}],
    }.items():
        for each in fields:
            for choice in ({"steering_profile": "careful"}, {"model": "lab@careful"}):
                response = eager.post(PATH, {**BODY, **each, **choice})
                error = response.json()["error"]
                assert (response.status_code, error["code"], error["param"]) == (400, "steering_unsupported", field)
    function = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
    assert send(eager, tools=[function], tool_choice="none", steering_profile="careful")["steering"]


@STREAMED
def test_a_response_that_is_kept_has_its_receipt(eager: Any, streamed: bool) -> None:
    answer = send(eager, streamed, model="lab@careful")
    assert eager.client.get(f"{PATH}/{answer['id']}").json() == answer
    assert eager.client.get(f"{PATH}/{send(eager, store=False, steering_profile='careful')['id']}").status_code == 404
    # The conversation goes on from what was said, and each turn is steered by what it asks for itself.
    follow_up = {"previous_response_id": answer["id"], "input": "What is 3 plus 5?"}
    steered = send(eager, streamed, steering_profile="careful", **follow_up)
    assert steered["usage"]["input_tokens"] > answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"]
    assert steered["steering"]["tokens_steered"] == expected_tokens("all", steered["usage"])
    assert "steering" not in send(eager, streamed, **follow_up)


def test_metrics(eager: Any) -> None:
    def counted(outcome: str) -> float:
        return float(eager.metric("steering_requests_total", profile="late", outcome=outcome))

    ok, refused = counted("ok"), counted("refused")
    send(eager, steering_profile="late")
    send(eager, True, model="lab@late")
    assert eager.post(PATH, {**BODY, "background": True, "model": "lab@late"}).status_code == 400
    # vLLM finds out that a prompt is too long when the request has been admitted.
    assert eager.post(PATH, {**BODY, "input": "x " * 2000, "steering_profile": "late"}).status_code == 400
    assert (counted("ok"), counted("refused")) == (ok + 2, refused + 2)


def test_openai_client(eager: Any, bundles: dict[str, Bundle]) -> None:
    with openai.OpenAI(base_url=f"{eager.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"input": QUESTION, "temperature": 0, "max_output_tokens": 16}
        choices: list[Any] = [
            {"model": "lab", "extra_body": {"steering_profile": "careful"}},
            {"model": "lab@careful"},
        ]
        for choice in choices:
            whole = client.responses.create(**choice, **options)
            assert whole.output_text == "7 plus 5 is 12."
            receipt = whole.to_dict()["steering"]
            assert receipt["bundle"] == bundles["careful"].digest
            *_, last = client.responses.create(**choice, **options, stream=True)
            assert last.type == "response.completed"
            assert last.response.to_dict()["steering"] == receipt
            with client.responses.stream(**choice, **options) as stream:
                final = stream.get_final_response()
            assert (final.output_text, final.model) == (whole.output_text, choice["model"])
            assert final.to_dict()["steering"] == receipt
        with pytest.raises(openai.NotFoundError) as refusal:
            client.responses.create(model="lab@carefull", **options)
        assert refusal.value.code == "steering_profile_not_found"
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.responses.create(model="lab@careful", background=True, **options)
        assert unsupported.value.code == "steering_unsupported"
