"""The server subject and the judge against a small HTTP server that answers as vLLM does, or wrongly on purpose."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from artifacts.evaluation import endpoint as http
from artifacts.evaluation.endpoint import Endpoint
from artifacts.evaluation.judge import Judge, Scores, parse_scores
from artifacts.evaluation.rows import EvaluationRow
from artifacts.evaluation.server import ServerSubject
from artifacts.evaluation.subject import UNSTEERED, Condition
from artifacts.jobs.errors import BuildError

DIGEST = f"sha256:{'a' * 64}"
CHAT = EvaluationRow.model_validate({"messages": [{"role": "user", "content": "hi"}], "answer": "ab"})
PLAIN = EvaluationRow.model_validate({"text": "xyz", "answer": "ab"})


class Answering:
    """What the small server does: `routes[path](body) -> (status, answer)`, and every request that came."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any, str | None]] = []
        self.routes: dict[str, Callable[[Any], Any]] = {
            "/v1/models": lambda _: {"data": [{"id": "m", "parent": None}, {"id": "m@careful", "parent": "m"}]},
            "/v1/steering/profiles": lambda _: {"profiles": [_profile("careful", "all"), _profile("late", "response")]},
            "/version": lambda _: {"version": "0.32.0"},
            "/tokenize": lambda body: {"tokens": [ord(char) for char in body.get("prompt") or ">>"]},
            "/v1/chat/completions": lambda body: _steered(body, {"message": {"content": " ab "}}),
            "/v1/completions": _complete,
        }

    def answer(self, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        self.requests.append((path, body, key))
        if path not in self.routes:
            return 404, {"error": {"message": f"no {path}"}}
        found = self.routes[path](body)
        return found if isinstance(found, tuple) else (200, found)


def _profile(name: str, scope: str) -> dict[str, Any]:
    return {"name": name, "description": "", "bundle": DIGEST, "strength": 0.4, "maximum_strength": 1.0, "scope": scope}


def _steered(body: Any, choice: dict[str, Any], **changes: Any) -> dict[str, Any]:
    asked = body.get("steering_profile")
    answer: dict[str, Any] = {"choices": [choice]}
    if asked is not None:
        receipt = {"profile": asked["name"], "bundle": DIGEST, "strength": asked["strength"], "tokens_steered": 3}
        receipt["scope"] = asked.get("scope", "all")
        answer["steering"] = receipt | changes
    return answer


def _complete(body: Any) -> dict[str, Any]:
    """Every token has log-probability minus a hundredth of its id; `b` is not the likeliest."""
    given = [{str(token): {"logprob": -token / 100, "rank": 2 if token == ord("b") else 1}} for token in body["prompt"]]
    choice = {"text": " done ", "prompt_logprobs": [None, *given[1:]], "finish_reason": "stop"}
    return _steered(body, choice)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Answering, str]]:
    # Pauses between attempts are for real servers.
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.0)
    answering = Answering()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = answering.answer(self.path, body, self.headers.get("authorization"))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _reply

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield answering, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def subject(answering: tuple[Answering, str]) -> Iterator[ServerSubject]:
    with Endpoint(answering[1], key="secret", workers=4) as endpoint:
        yield ServerSubject(endpoint)


def test_what_is_asked_is_what_the_condition_says(answering: tuple[Answering, str], subject: ServerSubject) -> None:
    assert subject.generate([CHAT, PLAIN], Condition("careful", -0.5), 7) == ["ab", "done"]
    sent = {path: body for path, body, _ in answering[0].requests if path.endswith("completions")}
    for body in sent.values():
        assert body["steering_profile"] == {"name": "careful", "strength": -0.5}
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 7)
    assert sent["/v1/chat/completions"]["messages"] == [{"role": "user", "content": "hi"}]
    assert {key for _, _, key in answering[0].requests} == {"Bearer secret"}
    assert subject.about()["vllm"] == "0.32.0"


def test_likelihoods_are_sums_over_the_continuation(answering: tuple[Answering, str], subject: ServerSubject) -> None:
    aa, ab = subject.log_likelihoods([CHAT, PLAIN], ["aa", "ab"], Condition("careful", 0.4))
    assert aa == (pytest.approx(-2 * 0.97), 2, True)
    assert ab == (pytest.approx(-0.97 - 0.98), 2, False)
    answering[0].routes["/v1/completions"] = lambda body: (
        _complete(body) | {"choices": [_complete(body)["choices"][0] | {"finish_reason": "length"}]}
    )
    # A chat's answer has to end there, a continuation of plain text has not.
    assert [each.greedy for each in subject.log_likelihoods([CHAT, PLAIN], ["aa", "aa"], UNSTEERED)] == [False, True]
    (text,) = subject.text_log_likelihoods([PLAIN], UNSTEERED)
    assert text[:2] == (pytest.approx(-(121 + 122) / 100), 2)


def test_texts_are_tokenised_once(answering: tuple[Answering, str], subject: ServerSubject) -> None:
    for strength in (0.1, 0.2, 0.3):
        subject.log_likelihoods([PLAIN], ["ab"], Condition("careful", strength))
    assert sum(path == "/tokenize" for path, _, _ in answering[0].requests) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"profile": "other"}, "receipt says profile 'other'"),
        ({"bundle": f"sha256:{'b' * 64}"}, "receipt says bundle"),
        ({"strength": 0.3}, "says strength 0.3 and 0.4 was asked for"),
        ({"strength": None}, "says strength None"),
        ({"tokens_steered": 0}, "counts no steered token"),
        ({"scope": "prompt"}, "says scope 'prompt', asked was all"),
    ],
)
def test_a_wrong_receipt_is_an_error(
    changes: dict[str, Any], reason: str, answering: tuple[Answering, str], subject: ServerSubject
) -> None:
    answering[0].routes["/v1/chat/completions"] = lambda body: _steered(body, {"message": {"content": "x"}}, **changes)
    with pytest.raises(BuildError, match=reason):
        subject.generate([CHAT], Condition("careful", 0.4), 7)


def test_a_missing_or_unasked_receipt_is_an_error(answering: tuple[Answering, str], subject: ServerSubject) -> None:
    answering[0].routes["/v1/chat/completions"] = lambda _: {"choices": [{"message": {"content": "x"}}]}
    assert subject.generate([CHAT], UNSTEERED, 7) == ["x"]
    with pytest.raises(BuildError, match="no receipt"):
        subject.generate([CHAT], Condition("careful", 0.4), 7)
    answering[0].routes["/v1/chat/completions"] = lambda _: {
        "choices": [{"message": {"content": "x"}}],
        "steering": {"profile": "careful"},
    }
    with pytest.raises(BuildError, match="unsteered answer carries the receipt"):
        subject.generate([CHAT], UNSTEERED, 7)


def test_what_cannot_be_measured_is_refused_before_it_is_asked(
    answering: tuple[Answering, str], subject: ServerSubject
) -> None:
    before = len(answering[0].requests)
    with pytest.raises(BuildError, match="no profile 'other'"):
        subject.generate([CHAT], Condition("other", 0.4), 7)
    with pytest.raises(BuildError, match=r"takes strengths up to 1, and 1\.5"):
        subject.generate([CHAT], Condition("careful", 1.5), 7)
    with pytest.raises(BuildError, match="scope response"):
        subject.log_likelihoods([CHAT], ["ab"], Condition("late", 0.4))
    assert len(answering[0].requests) == before
    # Neutral text asks for every token, whatever the profile's scope.
    subject.text_log_likelihoods([PLAIN], Condition("late", 0.4))
    assert answering[0].requests[-1][1]["steering_profile"]["scope"] == "all"


def test_failures_name_address_and_cause_and_never_the_key(answering: tuple[Answering, str]) -> None:
    small, url = answering
    with Endpoint(url, key="secret") as endpoint:
        small.routes["/bad"] = lambda _: (400, {"error": {"message": "too long"}})
        small.routes["/text"] = lambda _: (200, b"<html>")
        for path, reason in (("/bad", "400: 'too long'"), ("/text", "answered no JSON"), ("/none", "404")):
            with pytest.raises(BuildError, match=reason) as caught:
                endpoint.post(path, {})
            assert "secret" not in str(caught.value) and url in str(caught.value)
    with Endpoint("http://127.0.0.1:9") as endpoint, pytest.raises(BuildError, match="cannot be reached"):
        endpoint.get("/v1/models")
    for address in ("nonsense", "ftp://host", "http://"):
        with pytest.raises(BuildError, match="no http address"):
            Endpoint(address)


def test_a_busy_server_is_asked_again_and_not_for_ever(answering: tuple[Answering, str]) -> None:
    small, url = answering
    replies: list[Any] = [(503, {}), (429, {}), {"fine": True}]
    small.routes["/busy"] = lambda _: replies.pop(0)
    small.routes["/full"] = lambda _: (503, {"error": {"message": "full"}})
    with Endpoint(url) as endpoint:
        assert endpoint.post("/busy", {}) == {"fine": True}
        with pytest.raises(BuildError, match="503: 'full'"):
            endpoint.post("/full", {})
    assert sum(path == "/full" for path, _, _ in small.requests) == 4


def test_servers_that_are_no_steering_servers_are_refused(answering: tuple[Answering, str]) -> None:
    small, url = answering
    with Endpoint(url) as endpoint:
        with pytest.raises(BuildError, match=r"serves \['m'\] and not 'other'"):
            ServerSubject(endpoint, "other")
        del small.routes["/v1/steering/profiles"]
        with pytest.raises(BuildError, match="profiles answered 404"):
            ServerSubject(endpoint)


def _judgement(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


@pytest.mark.parametrize(
    "reply",
    [
        _judgement("concept: 2"),
        _judgement('{"concept": 2, "instruction": 2}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": 3}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": -1}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": 1.5}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": true}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": "2"}'),
        _judgement('{"concept": 2, "instruction": 2, "fluency": 2, "note": 1}'),
        _judgement('Sure! {"concept": 2, "instruction": 2, "fluency": 2}'),
        _judgement("[" * 100_000),
        _judgement("[2, 2, 2]"),
        _judgement(None),
        {"choices": []},
        [],
    ],
)
def test_what_is_no_judgement_is_no_score(reply: Any) -> None:
    assert parse_scores(reply) is None


def test_a_judge_scores_in_order_and_failures_are_counted(answering: tuple[Answering, str]) -> None:
    small, url = answering

    def judge(body: Any) -> Any:
        asked = json.loads(body["messages"][1]["content"])
        assert "says sums" in body["messages"][0]["content"]
        if asked["answer"] == "broken":
            return 500, {"error": {"message": "out of memory"}}
        return _judgement(json.dumps({"concept": len(asked["answer"]), "instruction": 2, "fluency": 1}))

    small.routes["/v1/chat/completions"] = judge
    with Endpoint(f"{url}/v1") as endpoint:
        scores = Judge(endpoint, "judge", "says sums").score(["q"] * 4, ["", "ab", "broken", "abc"])
        assert scores == [Scores(0, 2, 1), Scores(2, 2, 1), None, None]
        Judge(endpoint, "judge", "says sums").check()
        del small.routes["/v1/chat/completions"]
        with pytest.raises(BuildError, match="404: 'no /v1/chat/completions'"):
            Judge(endpoint, "judge", "says sums").check()
