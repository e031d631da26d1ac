"""A small server that says what a test wants, so that clients meet answers that a real server never gives."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

DIGEST = "sha256:" + "ab" * 32


@dataclass
class Fake:
    """What the server knows and says, and the requests that it got.

    Attributes:
        url: of the server.
        profiles: strength of each, for lists and receipts.
        gives_receipts: whether steered answers carry them.
        counts: whether requests are counted in `/metrics`.
        texts: pieces of every answer.
        pause_s: before each of them.
        last_event: data that streams end with, in place of the usual end.
        ends_early: whether streams break off before their end.
        refusal: status and body of every answer.
        models: whole answer of `/v1/models`, if another than the usual one.
        requests: bodies of completions, in order.
        keys: authorization headers of those.
        counted: requests of each profile.
        num_left: streams whose client went away.
    """

    url: str = ""
    profiles: dict[str, float] = field(default_factory=lambda: {"careful": 0.5})
    gives_receipts: bool = True
    counts: bool = True
    texts: list[str] = field(default_factory=lambda: ["Nine", " lives", "."])
    pause_s: float = 0.0
    last_event: str | None = None
    ends_early: bool = False
    refusal: tuple[int, bytes] | None = None
    models: bytes | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)
    num_left: int = 0

    def receipt(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The receipt of a request."""
        asked = body.get("steering_profile")
        name = body["model"].partition("@")[2] or (asked["name"] if isinstance(asked, dict) else asked)
        if not name or not self.gives_receipts:
            return None
        strength = asked.get("strength") if isinstance(asked, dict) else None
        return {
            "profile": name,
            "bundle": DIGEST,
            "strength": self.profiles[name] if strength is None else strength,
            "scope": "all",
            "layers": [2],
            "tokens_steered": 12,
        }

    def model_list(self) -> bytes:
        """Answer of `GET /v1/models`."""
        if self.models is not None:
            return self.models
        cards: list[dict[str, Any]] = [{"id": "lab", "root": "artifacts/lab/models/target", "max_model_len": 512}]
        cards += [{"id": f"lab@{name}", "parent": "lab"} for name in self.profiles]
        return json.dumps({"object": "list", "data": cards}).encode()

    def metrics(self) -> bytes:
        """Answer of `GET /metrics`."""
        lines = []
        for name in self.profiles:
            lines.append(f'steering_requests_total{{profile="{name}",outcome="ok"}} {self.counted.get(name, 0)}')
            lines.append(f'steering_tokens_total{{profile="{name}",phase="prompt"}} {9 * self.counted.get(name, 0)}')
        return "\n".join([*lines, ""]).encode()

    def events(self, body: dict[str, Any]) -> Iterator[str]:
        """Data of a streamed answer."""
        is_chat = "messages" in body
        for text in self.texts:
            time.sleep(self.pause_s)
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            yield json.dumps({"choices": [choice | ({"delta": {"content": text}} if is_chat else {"text": text})]})
        if self.last_event is not None:
            yield self.last_event
        if self.ends_early or self.last_event is not None:
            return
        last: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": "stop", "delta": {}, "text": ""}]}
        receipt = self.receipt(body)
        yield json.dumps(last | ({"steering": receipt} if receipt else {}))
        yield json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(self.texts)}})
        yield "[DONE]"


class _Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.fake.refusal is not None:
            self._send(*self.fake.refusal)
        elif self.path == "/v1/models":
            self._send(200, self.fake.model_list())
        elif self.path == "/metrics" and self.fake.counts:
            self._send(200, self.fake.metrics())
        else:
            self._send(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.fake.requests.append(body)
        self.fake.keys.append(self.headers.get("authorization"))
        receipt = self.fake.receipt(body)
        if self.fake.refusal is not None:
            self._send(*self.fake.refusal)
        elif body.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for data in self.fake.events(body):
                try:
                    self.wfile.write(f"data: {data}\n\n".encode())
                except (BrokenPipeError, ConnectionResetError):
                    self.fake.num_left += 1
                    return
            self._count(receipt)
        else:
            # Whoever has the answer finds it counted.
            self._count(receipt)
            answer = {"choices": [{"text": "".join(self.fake.texts)}]} | ({"steering": receipt} if receipt else {})
            self._send(200, json.dumps(answer).encode())

    def _count(self, receipt: dict[str, Any] | None) -> None:
        if receipt:
            self.fake.counted[receipt["profile"]] = self.fake.counted.get(receipt["profile"], 0) + 1

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """The server, running."""
    said = Fake()
    handler = type("Handler", (_Handler,), {"fake": said})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    said.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield said
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
