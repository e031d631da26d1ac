"""Official clients against a real server, by `<model>@<profile>` and by field, and the examples of docs/clients.md."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
PROFILE, STRENGTH, QUESTION, MAX_TOKENS = "careful", 0.5, "What is 7 plus 5?", 16
OTHER_STRENGTH = -0.3
TIMEOUT_S = 240
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The two ways to steer: fields of the request for the OpenAI and Anthropic packages.
WAYS: dict[str, dict[str, Any]] = {
    "name": {"model": f"lab@{PROFILE}"},
    "body": {"model": "lab", "extra_body": {"steering_profile": {"name": PROFILE, "strength": OTHER_STRENGTH}}},
}


class Example(NamedTuple):
    """A block of docs/clients.md."""

    heading: str
    language: str
    code: str


def examples() -> list[Example]:
    """All of them, in order."""
    sections = re.split(r"^## ", (ROOT / "docs" / "clients.md").read_text(), flags=re.MULTILINE)[1:]
    return [Example(section.partition("\n")[0], *block) for section in sections for block in _BLOCK.findall(section)]


# What each example prints besides; the steered text is looked for in all of them but the raw stream.
PRINTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "curl": (1, ('"profile":"careful"', '"strength":0.5')),
    "OpenAI, Python": (3, ("sha256:", "tokens steered", "0.5", "steering_profile_not_found")),
    "OpenAI, Node": (2, ("sha256:", "tokens steered")),
    "Anthropic, Python": (2, ("sha256:", "tokens steered")),
    "Anthropic, Node": (2, ("sha256:", "tokens steered")),
    "LangChain": (2, ()),
    "Open WebUI, and other programs that list models": (0, ('"id":"lab@careful"', '"steering":', '"usage":', "[DONE]")),
    "In the terminal": (1, ("careful at 0.5",)),
}


@pytest.fixture(scope="module")
def expected(eager: Any) -> dict[str, str]:
    """Answers of the plain API: unsteered, and by each way."""

    def text(**fields: Any) -> str:
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": MAX_TOKENS}
        answer: str = eager.post("/v1/chat/completions", body | fields).json()["choices"][0]["message"]["content"]
        return answer

    profile = {"name": PROFILE, "strength": OTHER_STRENGTH}
    found = {"name": text(model=f"lab@{PROFILE}"), "body": text(model="lab", steering_profile=profile)}
    return found | {"unsteered": text(model="lab")}


@pytest.fixture(scope="module")
def node_modules(program: Callable[[str], str]) -> Path:
    """Folder of the installed Node packages; kept between runs, and made anew when their versions change."""
    npm, package = program("npm"), CLIENTS / "package.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    folder = cache / f"expertsteer-clients-{hashlib.sha256(package.read_bytes()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.copy(package, folder)
            command = [npm, "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode:
                reason = f"npm cannot install the clients: {done.stderr[-2000:]}"
                pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
            (folder / "complete").touch()
    return folder / "node_modules"


@pytest.fixture
def node(program: Callable[[str], str], node_modules: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a module with the Node packages; its standard output."""
    (tmp_path / "node_modules").symlink_to(node_modules)

    def run(code: str, *arguments: str, **environment: str) -> str:
        path = tmp_path / "client.mjs"
        path.write_text(code)
        return _output([program("node"), str(path), *arguments], tmp_path, environment)

    return run


def _output(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    # A request must not meet a proxy of the machine that it runs on.
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check(way: str, text: str, receipt: Any, expected: dict[str, str], digest: str) -> None:
    """Hold an answer against the plain API's."""
    assert text == expected[way]
    strength = STRENGTH if way == "name" else OTHER_STRENGTH
    assert (receipt["profile"], receipt["bundle"], receipt["strength"]) == (PROFILE, digest, strength)
    assert receipt["tokens_steered"] > 0


def test_steering_shows(expected: dict[str, str]) -> None:
    assert expected["unsteered"] != expected["name"]


@pytest.mark.parametrize("way", WAYS)
class TestOpenAi:
    @pytest.fixture
    def client(self, eager: Any) -> Iterator[openai.OpenAI]:
        """The official client."""
        with openai.OpenAI(base_url=f"{eager.url}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_chat(self, client: openai.OpenAI, way: str, expected: dict[str, str], bundles: Any) -> None:
        options: Any = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = client.chat.completions.create(**options, **WAYS[way])
        check(way, answer.choices[0].message.content, answer.to_dict()["steering"], expected, bundles[PROFILE].digest)
        text, receipt, usage = "", None, None
        stream = client.chat.completions.create(
            **options, **WAYS[way], stream=True, stream_options={"include_usage": True}
        )
        for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            receipt, usage = chunk.to_dict().get("steering") or receipt, chunk.usage or usage
        check(way, text, receipt, expected, bundles[PROFILE].digest)
        assert usage is not None and usage.completion_tokens > 0

    def test_completions(self, client: openai.OpenAI, way: str, eager: Any, bundles: Any) -> None:
        options: Any = {"prompt": QUESTION, "temperature": 0, "max_tokens": MAX_TOKENS}
        fields = dict(WAYS[way])
        plain = eager.post("/v1/completions", options | fields.pop("extra_body", {}) | fields).json()
        expected = {way: plain["choices"][0]["text"]}
        answer = client.completions.create(**options, **WAYS[way])
        check(way, answer.choices[0].text, answer.to_dict()["steering"], expected, bundles[PROFILE].digest)
        chunks = list(client.completions.create(**options, **WAYS[way], stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        (receipt,) = (chunk.to_dict()["steering"] for chunk in chunks if chunk.to_dict().get("steering"))
        check(way, text, receipt, expected, bundles[PROFILE].digest)

    def test_responses(self, client: openai.OpenAI, way: str, expected: dict[str, str], bundles: Any) -> None:
        options: Any = {"input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
        answer = client.responses.create(**options, **WAYS[way])
        check(way, answer.output_text, answer.to_dict()["steering"], expected, bundles[PROFILE].digest)
        events = list(client.responses.create(**options, **WAYS[way], stream=True))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        check(way, text, events[-1].response.to_dict()["steering"], expected, bundles[PROFILE].digest)


@pytest.mark.parametrize("way", WAYS)
def test_anthropic(eager: Any, way: str, expected: dict[str, str], bundles: Any) -> None:
    with anthropic.Anthropic(base_url=eager.url, api_key="none", max_retries=0) as client:
        options: Any = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS, **WAYS[way]}
        # The package has no argument for it.
        options["extra_body"] = {"temperature": 0, **options.get("extra_body", {})}
        message = client.messages.create(**options)
        text = "".join(block.text for block in message.content)
        check(way, text, message.to_dict()["steering"], expected, bundles[PROFILE].digest)
        events = list(client.messages.create(**options, stream=True))
        text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
        (receipt,) = (event.to_dict()["steering"] for event in events if event.type == "message_delta")
        check(way, text, receipt, expected, bundles[PROFILE].digest)


def test_refusals(eager: Any) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    with openai.OpenAI(base_url=f"{eager.url}/v1", api_key="none", max_retries=0) as client:
        assert f"lab@{PROFILE}" in [card.id for card in client.models.list()]
        with pytest.raises(openai.NotFoundError) as unknown:
            client.responses.create(model="lab@unknown", input=QUESTION)
        assert unknown.value.code == "steering_profile_not_found"
    with anthropic.Anthropic(base_url=eager.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError, match="steering_profile_not_found"):
            client.messages.create(model="lab@unknown", messages=messages, max_tokens=4)
        with pytest.raises(anthropic.BadRequestError, match="over its maximum"):
            profile = {"name": PROFILE, "strength": 99}
            client.messages.create(
                model="lab", messages=messages, max_tokens=4, extra_body={"steering_profile": profile}
            )


@pytest.mark.parametrize(
    ("module", "num_answers", "error"), [("openai", 8, "NotFoundError"), ("anthropic", 4, "NotFoundError")]
)
def test_node(
    eager: Any,
    node: Callable[..., str],
    expected: dict[str, str],
    bundles: Any,
    module: str,
    num_answers: int,
    error: str,
) -> None:
    code = (CLIENTS / f"{module}.mjs").read_text()
    found = json.loads(node(code, f"{eager.url}/v1", "lab", PROFILE, QUESTION, str(OTHER_STRENGTH)))
    assert len(found["found"]) == num_answers
    for name, (text, receipt) in found["found"].items():
        check(name.split()[1], text, receipt, expected, bundles[PROFILE].digest)
    assert found["refusal"] == [error, 404, "steering_profile_not_found"]
    assert f"lab@{PROFILE}" in found.get("models", [f"lab@{PROFILE}"])


def test_programs_that_list_models(eager: Any, expected: dict[str, str], bundles: Any) -> None:
    """As Open WebUI does it: what the list names is what is asked, streaming, with the usage."""
    listed = eager.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert all(card["id"] and card["object"] == "model" and card["owned_by"] for card in listed["data"])
    (chosen,) = (card["id"] for card in listed["data"] if card["id"].endswith(f"@{PROFILE}"))
    body = {
        "model": chosen,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = [line.removeprefix("data: ") for line in eager.post("/v1/chat/completions", body).text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["model"] for chunk in chunks} == {chosen} and chunks[-1]["usage"]["completion_tokens"] > 0
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    (receipt,) = (chunk["steering"] for chunk in chunks if chunk.get("steering"))
    check("name", text, receipt, expected, bundles[PROFILE].digest)


def test_every_example_is_run() -> None:
    assert [example.heading for example in examples()] == list(PRINTS)
    assert {example.language for example in examples()} == {"sh", "python", "js"}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.heading)
def test_example(
    example: Example, eager: Any, expected: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    environment = {"BASE_URL": f"{eager.url}/v1", "COLUMNS": "200"}
    if example.language == "js":
        out = request.getfixturevalue("node")(example.code, **environment)
    else:
        path = tmp_path / "example"
        path.write_text(example.code)
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        program = [sys.executable] if example.language == "python" else ["bash", "-eu", "-o", "pipefail"]
        out = _output([*program, str(path)], tmp_path, environment)
    times, words = PRINTS[example.heading]
    assert out.count(expected["name"]) == times, out
    assert expected["unsteered"] not in out
    for word in words:
        assert word in out, (word, out)
