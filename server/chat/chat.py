"""A conversation with a server: questions go in, answers are shown and kept."""

import asyncio
from collections.abc import Callable

import httpx

from server.chat.answer import Answer, ask
from server.chat.conversation import Conversation
from server.chat.screen import Screen
from server.client import SteeringClientError, checked_url
from server.inference import key_header

_UNSTEERED = "unsteered"


class Chat:
    """Asks a server and shows what it says.

    Attributes:
        conversation: what has been said and what steers.
        screen: where it is shown.
        last: the last answer that came to its end.
    """

    def __init__(self, conversation: Conversation, screen: Screen, url: str, key: str | None, timeout_s: float) -> None:
        """Prepare; nothing is sent.

        Args:
            conversation: see above.
            screen: see above.
            url: of the server.
            key: API key; None for a server without keys.
            timeout_s: how long the server may be silent.

        Raises:
            SteeringClientError: the address or the key cannot be one.
        """
        self.conversation, self.screen = conversation, screen
        self.last: Answer | None = None
        self._url, self._headers, self._timeout_s = checked_url(url), key_header(key), timeout_s

    def say(self, question: str) -> None:
        """Ask, show the answer, and add both to the conversation. Ctrl-C stops the answer and keeps what came.

        Raises:
            SteeringClientError: there is no whole answer; the conversation is as before.
            KeyboardInterrupt: stopped, after what came has been kept.
        """
        texts: tuple[list[str], list[str]] = [], []
        work = self._ask_both if self.conversation.is_side_by_side else self._ask_one
        try:
            asyncio.run(work(question, texts))
        except KeyboardInterrupt:
            if came := "".join(texts[1]):
                self.conversation.add(question, came)
            raise
        self.conversation.add(question, "".join(texts[1]))

    async def _ask_one(self, question: str, texts: tuple[list[str], list[str]]) -> None:
        def take(text: str, is_reasoning: bool) -> None:
            texts[1].extend([] if is_reasoning else [text])
            self.screen.stream(text, is_reasoning)

        try:
            async with self._client() as http:
                self.last = await ask(http, self.conversation.body(question), take)
        finally:
            self.screen.line()
        self.screen.facts(self.last)

    async def _ask_both(self, question: str, texts: tuple[list[str], list[str]]) -> None:
        """Both answers at a time; the steered one is kept, with an error if either has one."""
        names = (_UNSTEERED, self.conversation.label)
        bodies = [self.conversation.body(question, is_steered=is_steered) for is_steered in (False, True)]
        with self.screen.two_streams(names, texts):
            async with self._client() as http, asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_settled(http, body, _collect(parts)))
                    for body, parts in zip(bodies, texts, strict=True)
                ]
        self.screen.two_answers(names, ("".join(texts[0]), "".join(texts[1])))
        answers = [task.result() for task in tasks]
        for found in answers:
            if isinstance(found, SteeringClientError):
                raise found
            self.screen.facts(found)
            self.last = found

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=self._timeout_s)


async def _settled(
    http: httpx.AsyncClient, body: dict[str, object], on_text: Callable[[str, bool], None]
) -> Answer | SteeringClientError:
    """An answer, or why there is none: the other one goes on."""
    try:
        return await ask(http, body, on_text)
    except SteeringClientError as error:
        return error


def _collect(parts: list[str]) -> Callable[[str, bool], None]:
    def take(text: str, is_reasoning: bool) -> None:
        if not is_reasoning:
            parts.append(text)

    return take
