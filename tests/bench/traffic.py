"""Requests that go on while something else happens to the server, and must not notice it."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import TracebackType
from typing import Any, NamedTuple

import httpx

_TIMEOUT_S = 120.0
_PROMPTS = ("What is 7 plus 5?", "What is 31 plus 4?", "What is 18 plus 20?", "What is 2 plus 6?")


class Address(NamedTuple):
    """Where a server is, and a write key for it; None where there are no keys."""

    url: str
    key: str | None


def http_client(server: Address) -> httpx.Client:
    """A client with the server's key, for any number of threads."""
    headers = {} if server.key is None else {"authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=128, max_keepalive_connections=128)
    # A request must not meet a proxy of the machine it runs on.
    return httpx.Client(base_url=server.url, headers=headers, timeout=_TIMEOUT_S, limits=limits, trust_env=False)


def ask(client: httpx.Client, profile: str, prompt: str = _PROMPTS[0], max_tokens: int = 12) -> httpx.Response:
    """A greedy answer under a profile."""
    body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
    return client.post("/v1/completions", json=body | {"steering_profile": profile})


class Traffic:
    """Greedy requests under a profile that nobody changes, in several threads, while the block runs.

    Attributes:
        answers: how often each (status, prompt, text, bundle of the receipt) came.
    """

    def __init__(self, server: Address, profile: str, workers: int = 4) -> None:
        """Prepare; the requests begin with the block.

        Args:
            server: to ask.
            profile: that all of them name.
            workers: requests at a time.
        """
        self.answers: Counter[tuple[int, str, str, str | None]] = Counter()
        self._client = http_client(server)
        self._profile = profile
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._loops = [self._pool.submit(self._keep_asking, prompt) for prompt in (_PROMPTS * workers)[:workers]]

    def __enter__(self) -> "Traffic":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over.set()
        with closing(self._client), self._pool:
            for loop in self._loops:
                loop.result()

    @property
    def problems(self) -> list[str]:
        """What was not as it should be: other statuses than 200, or more than one answer to a prompt."""
        found = [f"{count} times {answer}" for answer, count in self.answers.items() if answer[0] != httpx.codes.OK]
        by_prompt: dict[str, set[tuple[str, str | None]]] = {}
        for _, prompt, text, bundle in self.answers:
            by_prompt.setdefault(prompt, set()).add((text, bundle))
        return found + [f"{prompt}: {each}" for prompt, each in by_prompt.items() if len(each) > 1]

    def _keep_asking(self, prompt: str) -> None:
        while not self._is_over.is_set():
            response = ask(self._client, self._profile, prompt)
            if response.status_code == httpx.codes.OK:
                body = response.json()
                self.answers[response.status_code, prompt, body["choices"][0]["text"], body["steering"]["bundle"]] += 1
            else:
                self.answers[response.status_code, prompt, response.text, None] += 1
