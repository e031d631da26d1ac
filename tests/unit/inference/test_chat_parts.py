"""Parts of `expertsteer chat`: text, events, answers, conversation."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.manifest import Scope
from server.chat.answer import Answer, ask
from server.chat.conversation import Conversation
from server.chat.events import event_data
from server.chat.text import compared, shown
from server.client import SteeringClientError


class TestText:
    @pytest.mark.parametrize(
        ("text", "safe"),
        [
            ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
            ("a\rb\x08\x7f\x9b", "a\\rb\\x08\\x7f\\x9b"),
            ("left\u202eright\u2066", "left\\u202eright\\u2066"),
            ("line\u2028line\ud800", "line\\u2028line\\ud800"),
        ],
    )
    def test_nothing_drives_the_terminal(self, text: str, safe: str) -> None:
        assert shown(text) == safe

    @pytest.mark.parametrize("text", ["two\n\tlines", "été 日本語　です", "می‌خواهم", "👩‍🔬", "a\u00a0b"])
    def test_languages_are_left_alone(self, text: str) -> None:
        assert shown(text) == text

    @given(st.text())
    def test_escaping_is_the_same_however_a_text_is_cut(self, text: str) -> None:
        assert shown(text) == "".join(map(shown, text))
        assert "\x1b" not in shown(text) and "\r" not in shown(text)

    def test_words_that_differ(self) -> None:
        left, right = compared("7 plus 5\nis 13.", "7 plus 5 is  12. Done")
        assert [piece.text for piece in left if piece.differs] == ["13."]
        assert [piece.text for piece in right if piece.differs] == ["12.", "Done"]

    @given(st.text(), st.text())
    def test_pieces_are_the_texts(self, left: str, right: str) -> None:
        pieces = compared(left, right)
        assert tuple("".join(piece.text for piece in side) for side in pieces) == (left, right)
        assert not any(piece.differs for side in compared(left, left) for piece in side)
        same = [[word for piece in side if not piece.differs for word in piece.text.split()] for side in pieces]
        assert same[0] == same[1]


class TestEvents:
    def data(self, *chunks: bytes) -> list[str]:
        """Data of the events in a body cut so."""

        async def collect() -> list[str]:
            async def stream() -> AsyncIterator[bytes]:
                for chunk in chunks:
                    yield chunk

            return [data async for data in event_data(stream())]

        return asyncio.run(collect())

    def test_events(self) -> None:
        body = b'data: {"a": 1}\n\n: ping\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\ndata: [DONE]\n\ndata: rest'
        assert self.data(body) == ['{"a": 1}', "b\nc", "[DONE]"]

    def test_cut_anywhere(self) -> None:
        body = "data: \u2028 é\n\ndata: 2\n\n".encode()
        for cut in range(len(body)):
            assert self.data(body[:cut], body[cut:]) == ["\u2028 é", "2"]


def answer(url: str, body: dict[str, Any], texts: list[tuple[str, bool]] | None = None) -> Answer:
    """Ask a server."""

    async def run() -> Answer:
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            return await ask(http, body, lambda *text: (texts if texts is not None else []).append(text))

    return asyncio.run(run())


def body(**changes: Any) -> dict[str, Any]:
    """A request."""
    return {"model": "lab", "messages": [{"role": "user", "content": "Hello"}]} | changes


class TestAnswer:
    def test_whole(self, fake: Any) -> None:
        texts: list[tuple[str, bool]] = []
        found = answer(fake.url, body(steering_profile={"name": "careful"}), texts)
        assert (found.text, found.finish_reason, found.num_tokens) == ("Nine lives.", "stop", 3)
        assert found.receipts[0].strength == 0.5 and texts == [(text, False) for text in fake.texts]
        assert answer(fake.url, body()).receipts == ()

    def test_reasoning_is_told_apart(self, fake: Any) -> None:
        fake.texts = []
        fake.events = lambda _: iter(
            [
                json.dumps({"choices": [{"delta": {field: "x"}}]})
                for field in ("reasoning", "reasoning_content", "content")
            ]
            + ["[DONE]"]
        )
        texts: list[tuple[str, bool]] = []
        assert answer(fake.url, body(), texts).text == "x"
        assert texts == [("x", True), ("x", True), ("x", False)]

    def test_no_receipt(self, fake: Any) -> None:
        fake.gives_receipts = False
        with pytest.raises(SteeringClientError, match="no receipt") as caught:
            answer(fake.url, body(steering_profile={"name": "careful"}))
        assert caught.value.code == "receipt_missing"

    def test_broken_off(self, fake: Any) -> None:
        fake.ends_early = True
        with pytest.raises(SteeringClientError, match="broke off") as caught:
            answer(fake.url, body())
        assert caught.value.code == "broken_answer"

    def test_error_at_the_end(self, fake: Any) -> None:
        fake.last_event = '{"error": {"message": "It was not applied.", "code": "steering_not_applied", "status": 500}}'
        with pytest.raises(SteeringClientError, match=r"^It was not applied\.$") as caught:
            answer(fake.url, body())
        assert (caught.value.code, caught.value.status) == ("steering_not_applied", 500)

    @pytest.mark.parametrize(
        "data", ["no json", "[]", '"text"', '{"choices": 7}', '{"choices": [7]}', '{"error": "x"}']
    )
    def test_not_understood(self, fake: Any, data: str) -> None:
        fake.last_event = data
        with pytest.raises(SteeringClientError, match="does not understand") as caught:
            answer(fake.url, body())
        assert caught.value.code == "bad_answer"

    def test_refused_and_not_reached(self, fake: Any) -> None:
        fake.refusal = 404, b'{"error": {"message": "None.", "type": "x", "code": "steering_profile_not_found"}}'
        with pytest.raises(SteeringClientError, match=r"^None\.$") as caught:
            answer(fake.url, body())
        assert (caught.value.code, caught.value.status) == ("steering_profile_not_found", 404)
        with pytest.raises(SteeringClientError, match="gives no answer") as late:
            answer("http://127.0.0.1:1", body())
        assert late.value.code == "unreachable"

    @pytest.mark.parametrize(
        ("num_tokens", "decode_s", "speed"), [(11, 2.0, 5.0), (1, 2.0, None), (None, 2.0, None), (5, 0.0, None)]
    )
    def test_speed(self, num_tokens: int | None, decode_s: float, speed: float | None) -> None:
        assert Answer("", None, (), num_tokens, decode_s).tokens_per_s == speed


class TestConversation:
    def test_requests(self) -> None:
        talk = Conversation("lab", "careful", -0.5, Scope.RESPONSE, system="Be brief.", max_tokens=9)
        talk.add("one", "two")
        steered, plain = talk.body("three"), talk.body("three", is_steered=False)
        assert steered == plain | {"steering_profile": {"name": "careful", "strength": -0.5, "scope": Scope.RESPONSE}}
        assert [message["role"] for message in plain["messages"]] == ["system", "user", "assistant", "user"]
        assert (plain["max_tokens"], plain["temperature"]) == (9, 0.0)
        assert json.loads(json.dumps(steered))["steering_profile"]["scope"] == "response"

    def test_defaults_of_a_profile_are_its_own(self) -> None:
        talk = Conversation("lab", "careful", -0.5, Scope.RESPONSE, is_side_by_side=True)
        assert talk.label == "careful -0.5 response"
        talk.choose("terse@sha256:" + "ab" * 32)
        assert talk.label == "terse@sha256:abababab" and talk.is_side_by_side
        assert talk.body("x")["steering_profile"] == {"name": "terse@sha256:" + "ab" * 32}
        talk.choose(None)
        assert talk.label == "unsteered" and not talk.is_side_by_side and "steering_profile" not in talk.body("x")

    def test_taking_back(self) -> None:
        talk = Conversation("lab")
        assert talk.take_back() is None
        talk.add("one", "two")
        talk.add("three", "four")
        assert talk.take_back() == "three"
        assert [message["content"] for message in talk.messages] == ["one", "two"]
