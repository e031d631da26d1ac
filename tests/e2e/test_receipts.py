"""Receipts: what ran, on how many tokens, streamed or not, and nothing on an unsteered answer."""

from typing import Any

import pytest

from artifacts.bundle import Bundle

pytestmark = pytest.mark.engine

SCOPES = ["all", "prompt", "response", "generation"]
CHAT = {"messages": [{"role": "user", "content": "What is 7 plus 5?"}]}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "What is 7 plus 5? It is"}}


def expected_tokens(scope: str, usage: dict[str, Any]) -> int:
    """Tokens that one request feeds through the model under a scope; its last answer token is never fed back."""
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    return {
        "all": prompt + completion - 1,
        "prompt": prompt,
        "response": completion,
        "generation": completion - 1,
    }[scope]


def send(server: Any, path: str, streamed: bool, **fields: Any) -> tuple[dict[str, Any], Any]:
    """Usage and receipt (None without one) of one request."""
    body = {"model": "lab", "temperature": 0, "max_tokens": 9, **PATHS[path], **fields}
    if not streamed:
        answer = server.post(path, body).json()
        return answer["usage"], answer.get("steering")
    chunks = server.stream(path, body)
    assert not any("steering" in chunk for chunk in chunks[:-1])
    return chunks[-1]["usage"], chunks[-1].get("steering")


@pytest.mark.parametrize("max_tokens", [1, 9])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scope", SCOPES)
def test_tokens_steered(
    eager: Any, bundles: dict[str, Bundle], scope: str, path: str, streamed: bool, max_tokens: int
) -> None:
    profile = {"name": "early", "strength": -0.5, "scope": scope}
    # Twice: the second time the prompt comes from the cache.
    for _ in range(2):
        usage, receipt = send(eager, path, streamed, steering_profile=profile, max_tokens=max_tokens)
        assert receipt == {
            "profile": "early",
            "bundle": bundles["early"].digest,
            "strength": -0.5,
            "scope": scope,
            "layers": [0, 2],
            "tokens_steered": expected_tokens(scope, usage),
        }


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_a_list_gets_a_list(eager: Any, path: str, streamed: bool) -> None:
    profiles = ["double", {"name": "late", "strength": 0}, {"name": "every", "scope": "prompt"}]
    usage, receipts = send(eager, path, streamed, steering_profile=profiles)
    assert [receipt["profile"] for receipt in receipts] == ["double", "late", "every"]
    assert [receipt["scope"] for receipt in receipts] == ["response", "all", "prompt"]
    assert [receipt["strength"] for receipt in receipts] == [1.0, 0.0, 0.5]
    assert [receipt["tokens_steered"] for receipt in receipts] == [
        expected_tokens("response", usage),
        0,
        expected_tokens("prompt", usage),
    ]
    _, receipts = send(eager, path, streamed, steering_profile=["early"])
    assert isinstance(receipts, list)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_strength_0_has_a_receipt_of_no_tokens(eager: Any, path: str, streamed: bool) -> None:
    _, receipt = send(eager, path, streamed, steering_profile={"name": "early", "strength": 0})
    assert (receipt["strength"], receipt["tokens_steered"]) == (0.0, 0)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields", [{}, {"steering_profile": None}], ids=["absent", "null"])
def test_an_unsteered_answer_has_no_receipt(eager: Any, path: str, streamed: bool, fields: dict[str, Any]) -> None:
    assert send(eager, path, streamed, **fields)[1] is None
    response = eager.post(path, {"model": "lab", "max_tokens": 2, **PATHS[path], **fields})
    assert "steering" not in response.json()
    assert "x-steering-bundle" not in response.headers


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_header(eager: Any, bundles: dict[str, Bundle], path: str, streamed: bool) -> None:
    def header(profile: Any) -> str:
        body = {"model": "lab", "max_tokens": 2, "stream": streamed, "steering_profile": profile, **PATHS[path]}
        value: str = eager.post(path, body).headers["x-steering-bundle"]
        return value

    assert header("early") == bundles["early"].digest
    assert header(["early", "careful"]) == f"{bundles['early'].digest}, {bundles['careful'].digest}"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_the_model_name_selects_a_profile(eager: Any, path: str, streamed: bool) -> None:
    body = {"model": "lab@careful", "temperature": 0, "max_tokens": 12, **PATHS[path]}
    named, by_field = (
        send(eager, path, streamed, model="lab@careful"),
        send(eager, path, streamed, steering_profile="careful"),
    )
    assert named == by_field
    if streamed:
        assert {chunk["model"] for chunk in eager.stream(path, body)} == {"lab@careful"}
    else:
        assert eager.post(path, body).json()["model"] == "lab@careful"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("scope", SCOPES)
def test_choices_and_prompts_add_up(eager: Any, text_tokens: list[int], scope: str, streamed: bool) -> None:
    prompts = [text_tokens[:17], text_tokens[40:63]]
    num_prompt_tokens, choices = 40, 3
    profile = {"name": "late", "scope": scope}
    usage, receipt = send(
        eager,
        "/v1/completions",
        streamed,
        prompt=prompts,
        n=choices,
        temperature=1.0,
        seed=3,
        max_tokens=7,
        ignore_eos=True,
        steering_profile=profile,
    )
    answers = len(prompts) * choices
    assert usage["completion_tokens"] == 7 * answers
    assert (
        receipt["tokens_steered"]
        == {
            "all": choices * num_prompt_tokens + 6 * answers,
            "prompt": choices * num_prompt_tokens,
            "response": 7 * answers,
            "generation": 6 * answers,
        }[scope]
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_an_answer_that_a_stop_string_ends(eager: Any, text_tokens: list[int], streamed: bool) -> None:
    for scope in SCOPES:
        profile = {"name": "careful", "scope": scope}
        fields = {"prompt": text_tokens[:40], "max_tokens": 100, "stop": ["."], "ignore_eos": True}
        usage, receipt = send(eager, "/v1/completions", streamed, **fields, steering_profile=profile)
        assert usage["completion_tokens"] < 100
        assert receipt["tokens_steered"] == expected_tokens(scope, usage)
