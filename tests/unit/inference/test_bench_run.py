"""`expertsteer bench` against servers that do not steer as they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.bench import checks
from server.bench.client import BenchError
from server.bench.plan import Plan
from server.cli import parser_of
from server.commands import bench
from server.inference import InferenceClient

TARGET = Path(__file__).parents[3] / "artifacts" / "lab" / "models" / "target"
SMALL = ("--rates", "inf", "--num-prompts", "2", "--rounds", "1", "--input-len", "16", "--output-len", "3")

PLAN = Plan("", "lab", "", ("careful",), (1.0,), 1, input_tokens=1, output_tokens=1, num_rounds=1, seed=0, salt="")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no key of the user's, and a server that counts at once or never."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("EXPERTSTEER_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(checks, "_COUNT_TIMEOUT_S", 0.5)


def call(*arguments: str | Path) -> int:
    """Run the command."""
    return bench.run(parser_of("bench", bench).parse_args([str(each) for each in arguments]))


def test_whole_run(fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    (tmp_path / "key").write_text("inference-key\n")
    connection = ("--server", fake.url, "--key-file", tmp_path / "key", "--tokenizer", TARGET)
    assert call(*connection, *SMALL, "-o", folder) == 0
    printed = capsys.readouterr()
    assert "careful / unsteered" in printed.out and "TTFT p50, ms" in printed.out and "0 of 2" in printed.out
    assert "careful at all at once, round 1" in printed.err
    report = json.loads((folder / "bench.json").read_text())
    assert [arm["tokens_steered"] for arm in report["arms"]] == [None, 18]
    streamed = [body for body in fake.requests if body.get("stream")]
    assert {body["model"] for body in streamed} == {"lab", "lab@careful"}
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] for body in streamed)
    assert {key for key, body in zip(fake.keys, fake.requests, strict=True) if body in streamed} == {
        "Bearer inference-key"
    }
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".png")
    assert "inference-key" not in text
    assert call("--server", fake.url, "--tokenizer", TARGET, *SMALL, "-o", folder) == 1
    assert "holds a result already" in capsys.readouterr().err


def test_counters_that_go_away(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there at the start and cannot be read any more when the first turn begins."""
    events = fake.events

    def last_answers(body: dict[str, Any]) -> Any:
        fake.counts = False
        return events(body)

    monkeypatch.setattr(fake, "events", last_answers)
    assert call("--server", fake.url, "--tokenizer", TARGET, *SMALL, "-o", tmp_path / "results") == 0
    report = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert [arm["tokens_steered"] for arm in report["arms"]] == [None, None]
    assert "The server's counters could not be read before some turns." in report["notes"][0]
    assert not any("own counts" in note for note in report["notes"])


def test_counters_that_stand_still(fake: Any) -> None:
    with InferenceClient(fake.url) as client:
        before = checks.count(client, "careful@sha256:0123")
        assert before == checks.Counted(0, 0)
        with pytest.raises(BenchError, match="counted 0 requests and 0 tokens steered by 'careful' where 2 requests"):
            checks.steered_tokens(client, "careful", before, 2)
        fake.counted["careful"] = 2
        assert checks.steered_tokens(client, "careful", before, 2) == 18
        fake.counts = False
        assert checks.count(client, "careful") is None


def test_a_profile_that_changes_meanwhile(fake: Any) -> None:
    with InferenceClient(fake.url) as client:
        before = checks.probe(client, PLAN)
        checks.check_unchanged(before, checks.probe(client, PLAN))
        fake.profiles["careful"] = 0.9
        with pytest.raises(BenchError, match="'careful' was changed while it was measured"):
            checks.check_unchanged(before, checks.probe(client, PLAN))


class TestProbe:
    """Refusals before anything is measured."""

    def refused(self, fake: Any, folder: Path, *arguments: str | Path) -> None:
        """Run in vain."""
        assert call("--server", fake.url, "--tokenizer", TARGET, *SMALL, *arguments, "-o", folder) == 1
        assert not folder.exists()

    def test_no_receipt(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fake.gives_receipts = False
        self.refused(fake, tmp_path / "results")
        assert "'careful' did not steer a probe (no receipt)" in capsys.readouterr().err

    def test_strength_zero(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fake.profiles["careful"] = 0.0
        self.refused(fake, tmp_path / "results")
        assert "did not steer a probe (strength 0, " in capsys.readouterr().err

    def test_no_profile(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.refused(fake, tmp_path / "results", "--profile", "carefull")
        fake.profiles.clear()
        self.refused(fake, tmp_path / "results")
        errors = capsys.readouterr().err
        assert "near names: careful" in errors and "lists no profile for this key" in errors

    def test_no_permission(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = {"message": "Give an API key.", "type": "AuthenticationError", "code": "invalid_api_key"}
        fake.refusal = 401, json.dumps({"error": error}).encode()
        self.refused(fake, tmp_path / "results")
        assert capsys.readouterr().err == "expertsteer bench: Give an API key.\n"

    def test_too_long(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.refused(fake, tmp_path / "results", "--input-len", "600")
        assert "are 603 tokens together; the server takes 512" in capsys.readouterr().err

    def test_tokenizer_that_is_elsewhere(self, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fake.models = json.dumps(
            {"data": [{"id": "lab", "root": "/srv/a"}, {"id": "lab@careful", "parent": "lab"}]}
        ).encode()
        assert call("--server", fake.url, *SMALL, "-o", tmp_path / "results") == 1
        assert "'/srv/a' on the server, not here; name a folder or an id with --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rates", "0"), "is not a number of requests a second"),
        (("--rates", "nan"), "is not a number of requests a second"),
        (("--num-prompts", "0"), "is not a whole number from 1 to 100000"),
        (("--rounds", "9" * 50), "is not a whole number"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_arguments_out_of_bounds(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err
