"""`expertsteer demo`: its flags, what it passes on, and what it says where its questions are not answered."""

import argparse
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.commands import demo


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


class _Refusing(BaseHTTPRequestHandler):
    """Is ready, answers every question as a server does that asks for a key, and keeps what it was sent."""

    requests: list[tuple[str | None, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append((self.headers["authorization"], body))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "give a key"}}')

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[tuple[str | None, dict[str, Any]]]]]:
    """Address of a server that refuses, and what it has been asked."""
    handler = type("Handler", (_Refusing,), {"requests": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.requests
        finally:
            server.shutdown()
            thread.join()


def test_passes_flags_on_behind_its_own() -> None:
    arguments = demo.serve_arguments(parse("--port", "8001", "--", "--steering-registry", "/data", "--max-num-seqs=4"))
    assert Path(arguments[0]).name == "target" and Path(arguments[0]).is_dir()
    assert arguments[arguments.index("--port") + 1] == "8001"
    assert arguments[-3:] == ["--steering-registry", "/data", "--max-num-seqs=4"]
    assert "--enforce-eager" in arguments
    assert "--enforce-eager" not in demo.serve_arguments(parse("--compile"))


@pytest.mark.parametrize("flag", ["--host", "--port=1", "--served_model_name=x", "--ssl-certfile", "--uds"])
def test_refuses_flags_that_it_has_to_know(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--", flag]) == 1
    assert f"{flag.split('=')[0]} cannot stand behind --; the demo takes" in capsys.readouterr().err


def test_says_that_a_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port} ([Errno" in capsys.readouterr().err


def test_says_that_a_number_is_no_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "70000"]) == 1
    said = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1:70000" in said and "port must be 0-65535" in said


def test_asks_its_server_past_a_proxy(
    refusing: tuple[str, list[tuple[str | None, dict[str, Any]]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Nothing listens there.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(demo, "_START_TIMEOUT_S", 30)
    url, requests = refusing
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert demo._wait_until_ready(process, url)
        process.kill()
    demo._show(url)
    assert len(requests) == 1 and "the server answers 401" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({}, None),
        ({"EXPERTSTEER_ADMIN_KEY": "write"}, "Bearer write"),
        ({"EXPERTSTEER_ADMIN_KEY": "write", "VLLM_API_KEY": "ask"}, "Bearer ask"),
        ({"VLLM_API_KEY": ""}, None),
    ],
)
def test_a_server_that_refuses_is_still_served(
    refusing: tuple[str, list[tuple[str | None, dict[str, Any]]]],
    variables: dict[str, str],
    sent: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("EXPERTSTEER_ADMIN_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url, requests = refusing
    demo._show(url)
    assert 'not asked: the server answers 401, {"error": {"message": "give a key"}}' in capsys.readouterr().out
    assert [(key, body["steering_profile"]) for key, body in requests] == [(sent, "careful")]
