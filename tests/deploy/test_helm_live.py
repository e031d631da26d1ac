"""What the chart knows of a running server, held against one: the script of `helm test`, the series to scale on."""

import contextlib
import http.server
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import charts
import pytest

PROMPT = "What is 7 plus 5?"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the script against an address, with the environment that the chart gives it."""
    specification = importlib.util.spec_from_file_location("ask", charts.CHART / "files" / "ask.py")
    assert specification is not None and specification.loader is not None
    script: ModuleType = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)

    def run(url: str, profile: str = "", key: str = "") -> str:
        monkeypatch.setenv("SERVER", f"{url}/")
        monkeypatch.setenv("PROMPT", PROMPT)
        monkeypatch.setenv("PROFILE", profile)
        monkeypatch.setenv("VLLM_API_KEY", key)
        line: str = script.check()
        return line

    return run


@pytest.mark.engine
def test_a_steered_answer_passes(eager: Any, ask: Callable[..., str]) -> None:
    wanted = r"lab with careful answers .+: [1-9]\d* tokens steered at strength 0\.5 by sha256:[0-9a-f]{64}\."
    assert re.fullmatch(wanted, ask(eager.url, "careful"))


@pytest.mark.engine
def test_without_a_name_the_first_profile_is_asked_for(eager: Any, ask: Callable[..., str]) -> None:
    first = eager.client.get("/v1/steering/profiles").json()["profiles"][0]["name"]
    assert ask(eager.url).startswith(f"lab with {first} answers ")


@pytest.mark.engine
def test_an_unknown_profile_fails(eager: Any, ask: Callable[..., str]) -> None:
    with pytest.raises(OSError, match="404"):
        ask(eager.url, "no-such-profile")


@contextlib.contextmanager
def answering(receipt: Any, keys: list[str | None]) -> Iterator[str]:
    """Address of a server with one profile, which answers with this receipt and notes the keys that it is given."""
    answers = {
        "/v1/models": {"data": [{"id": "lab"}]},
        "/v1/steering/profiles": {"profiles": [{"name": "calm"}] if receipt else []},
        "/v1/completions": {"choices": [{"text": "12"}], "steering": receipt},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    "fields", [{"profile": "calm", "tokens_steered": 0}, {"profile": "other", "tokens_steered": 3}]
)
def test_an_answer_that_is_not_steered_as_asked_fails(ask: Callable[..., str], fields: dict[str, Any]) -> None:
    with (
        answering({"strength": 0.5, "bundle": "b"} | fields, []) as url,
        pytest.raises(ValueError, match="receipt says"),
    ):
        ask(url)


def test_the_key_is_sent(ask: Callable[..., str]) -> None:
    keys: list[str | None] = []
    with answering(None, keys) as url:
        assert "no profile yet" in ask(url, key="a-key")
        assert keys == ["Bearer a-key"] * 3
        ask(url)
    assert keys[3:] == [None] * 3


@pytest.mark.engine
def test_the_series_to_scale_on_exist(eager: Any) -> None:
    scraped = set(re.findall(r"^([a-z_:]+)(?:\{.*\})? \S+$", eager.client.get("/metrics").text, re.MULTILINE))
    adapter = charts.read(charts.DEPLOY / "helm" / "prometheus-adapter-values.yaml")
    series = {rule["seriesQuery"].partition("{")[0] for rule in adapter["rules"]["custom"]}
    manifest = {"registry": {"mode": "manifest", "bundles": {"schema": 1, "profiles": {}}}}
    keda = charts.only(
        charts.one_model({"keda": {"enabled": True, "targets": {"steeredRequests": 40}}}, steering=manifest),
        "ScaledObject",
    )
    queries = [each["metadata"]["query"] for each in keda["spec"]["triggers"]]
    named = {name for query in queries for name in re.findall(r"(?:vllm:|steering_)\w+", query)}
    assert named == series
    assert series <= scraped
