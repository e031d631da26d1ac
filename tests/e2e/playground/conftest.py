"""A browser that watches the page it shows, and a scripted server for troubles that a real one seldom has."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, expect, sync_playwright

from server.routes import playground

# Nothing that a browser asks on its own account, and no sandbox, which containers do not allow.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
TIMEOUT_MS = 60_000
START_TIMEOUT_S = 20
# What Chromium itself writes to the console for every answer that is not a success.
_REFUSED = "Failed to load resource: the server responded with a status of "
_STORED = "[localStorage.length, sessionStorage.length, document.cookie.length, location.search.length]"


@dataclass
class Visit:
    """A page that was opened, and what it did.

    Attributes:
        page: the page.
        url: its address, with the slash at the end.
        refusals: statuses of refusals that the test means to see; others fail it.
        errors: what went wrong in the page.
        requests: every address that it asked for.
        responses: every answer that it got.
    """

    page: Page
    url: str
    refusals: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)

    def watch(self) -> None:
        """Note everything from now on."""
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", lambda response: self.responses.append(response))

    def _note(self, message: ConsoleMessage) -> None:
        refusal = any(message.text.startswith(f"{_REFUSED}{status}") for status in self.refusals)
        if message.type in ("error", "warning") and not refusal:
            self.errors.append(message.text)

    def check(self) -> None:
        """The page said nothing wrong, asked nobody else, and kept nothing."""
        assert self.errors == []
        origin = urlsplit(self.url).netloc
        assert {urlsplit(url).netloc for url in self.requests if not url.startswith("data:")} == {origin}
        assert self.page.evaluate(_STORED) == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def browser(program: Callable[[str], str]) -> Iterator[Browser]:
    """Chromium. Of a module, because Playwright keeps an event loop running, and asynchronous tests need their own."""
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def blank_page(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Begin a visit to a server in a fresh context; keyword arguments are those of the context."""
    visits = []

    def begin(server: str, **options: Any) -> Visit:
        context = browser.new_context(**options)
        visits.append(found := Visit(context.new_page(), f"{server}/playground/"))
        found.watch()
        return found

    yield begin
    for each in visits:
        each.check()
        each.page.context.close()


@pytest.fixture
def visit(blank_page: Callable[..., Visit]) -> Callable[..., Visit]:
    """Open the playground of a server in a fresh context; keyword arguments are those of the context."""

    def open_page(server: str, fragment: str = "", **options: Any) -> Visit:
        found = blank_page(server, **options)
        found.page.goto(found.url + fragment)
        return found

    return open_page


class Scripted:
    """The page's real routes beside answers that a test sets.

    Attributes:
        url: where it is served, with a prefix that a proxy would add.
        models: ids that `/v1/models` lists.
        profiles: entries of `/v1/steering/profiles`.
        refusal: status, error and headers that every request to `/v1` gets, while set.
        chat: body of the stream of an answer, made of path and body of the request; None waits for `gate`.
        gate: holds answers back until it is set.
        asked: method, path, body and `authorization` of requests so far.
    """

    def __init__(self) -> None:
        self.url = ""
        self.models: list[str] = ["lab"]
        self.profiles: list[dict[str, Any]] = []
        self.refusal: Callable[[Request], JSONResponse | None] = lambda _: None
        self.chat: Callable[[str, dict[str, Any]], list[str | None]] = lambda _path, _body: []
        self.gate = threading.Event()
        self.asked: list[tuple[str, Any, str | None]] = []

    def app(self) -> FastAPI:
        """The app, under the prefix."""
        app, outer = FastAPI(), FastAPI()

        @app.get("/v1/models", response_model=None)
        async def models(request: Request) -> JSONResponse:
            return self.refusal(request) or JSONResponse({"data": [{"id": name} for name in self.models]})

        @app.get("/v1/steering/profiles", response_model=None)
        async def profiles(request: Request, limit: int, cursor: int = 0) -> JSONResponse:
            following = cursor + limit if cursor + limit < len(self.profiles) else None
            page = {"profiles": self.profiles[cursor : cursor + limit], "next": following}
            return self.refusal(request) or JSONResponse(page)

        @app.post("/v1/chat/completions", response_model=None)
        @app.post("/v1/completions", response_model=None)
        async def complete(request: Request) -> JSONResponse | StreamingResponse:
            path = request.url.path.partition("/v1/")[2]
            body = await request.json()
            self.asked.append((path, body, request.headers.get("authorization")))
            refused = self.refusal(request)
            if refused is not None:
                return refused

            async def stream() -> AsyncIterator[str]:
                for chunk in self.chat(path, body):
                    while chunk is None and not self.gate.is_set():
                        await asyncio.sleep(0.01)
                    yield chunk or ""

            return StreamingResponse(stream(), media_type="text/event-stream")

        playground.attach(app)
        outer.mount("/team/llm", app)
        return outer


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A server without an engine, on a thread."""
    script = Scripted()
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(script.app(), log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.started
            script.url = f"http://127.0.0.1:{listener.getsockname()[1]}/team/llm"
            yield script
        finally:
            server.should_exit = True
            thread.join()


def _wait_for_routes(page: Page, held: Sequence[Any], count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while len(held) < count and time.monotonic() < deadline:
        # The browser hands requests over while this waits, not before.
        page.wait_for_timeout(20)
    assert len(held) >= count


@pytest.fixture
def wait_for_routes() -> Callable[[Page, Sequence[Any], int], None]:
    """Wait until a route's handler has put so many requests of the page into a list."""
    return _wait_for_routes


def _profile(name: str, **changes: Any) -> dict[str, Any]:
    shown = {
        **{"name": name, "description": f"What {name} does.", "bundle": "sha256:" + "ab" * 32, "strength": 0.5},
        **{"maximum_strength": 1.5, "scope": "all", "layers": [2], "exclude": [], "generation": 1},
    }
    return shown | changes


@pytest.fixture
def profile() -> Callable[..., dict[str, Any]]:
    """An entry of the list of profiles; keyword arguments replace parts."""
    return _profile
