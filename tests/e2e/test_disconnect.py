"""Clients that go away in the middle of a stream leave nothing behind."""

import time
from typing import Any

import pytest

pytestmark = pytest.mark.engine

CLIENTS, AT_A_TIME, MAX_TOKENS = 200, 16, 400
SETTLE_TIMEOUT_S = 30
PROFILES: list[Any] = [
    "careful",
    {"name": "early", "strength": 1.5},
    [{"name": "late"}, {"name": "every", "scope": "response"}],
    {"name": "double", "strength": -1, "scope": "generation"},
    None,
]
PATHS = ["/v1/completions", "/v1/responses", "/v1/messages"]


def body_of(path: str, index: int) -> dict[str, Any]:
    text = f"What is {index} plus 5?"
    if path == "/v1/completions":
        return {"prompt": text, "max_tokens": MAX_TOKENS, "ignore_eos": True, "n": 1 + index % 2}
    if path == "/v1/responses":
        return {"input": text, "max_output_tokens": MAX_TOKENS, "ignore_eos": True}
    # This route knows no way to go on after the end of an answer.
    return {"messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS}


def leave_after_the_first_chunk(server: Any, index: int) -> int:
    profile, path = PROFILES[index % len(PROFILES)], PATHS[index % len(PATHS)]
    body = {"model": "lab", "stream": True, **body_of(path, index)}
    body |= {} if profile is None else {"steering_profile": profile}
    with server.client.stream("POST", path, json=body) as response:
        status: int = response.status_code
        for line in response.iter_lines():
            if line.startswith("data: "):
                break
    return status


def left_over(server: Any) -> dict[str, float]:
    status = server.steering_status()[0]
    return {
        "running": server.metric("vllm:num_requests_running"),
        "waiting": server.metric("vllm:num_requests_waiting"),
        "slots": status["slots_used"],
        "requests": status["requests"],
    }


def test_200_clients_leave(eager: Any) -> None:
    before = eager.complete("What is 7 plus 5?", max_tokens=12, steering_profile="careful")["choices"]
    generated = eager.metric("vllm:generation_tokens_total")
    statuses = eager.map(lambda index: leave_after_the_first_chunk(eager, index), range(CLIENTS), AT_A_TIME)
    assert statuses == [200] * CLIENTS
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while any(left_over(eager).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(eager) == {"running": 0, "waiting": 0, "slots": 0, "requests": 0}
    # They were cut off indeed, and did not merely go unread.
    assert eager.metric("vllm:generation_tokens_total") - generated < CLIENTS * MAX_TOKENS / 2
    assert eager.complete("What is 7 plus 5?", max_tokens=12, steering_profile="careful")["choices"] == before
