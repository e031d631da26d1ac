"""`expertsteer chat` on a terminal, with a server that answers as no real one does."""

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pseudo_terminal import Terminal

from server.cli import parser_of
from server.commands import chat

PROMPT = "careful> "


def start(fake: Any, *arguments: str, **size: Any) -> Terminal:
    """Start a chat with the fake server."""
    return Terminal("chat", "--server", fake.url, "--profile", "careful", *arguments, **size)


def test_ctrl_c_stops_the_answer_and_not_the_program(fake: Any) -> None:
    fake.texts, fake.pause_s = [f"word{number} " for number in range(500)], 0.05
    with start(fake) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("First question\r")
        terminal.wait_for("word3 ")
        terminal.type("\x03")
        assert "word499" not in terminal.wait_for("Stopped.")
        terminal.wait_for(PROMPT)
        deadline_s = time.monotonic() + 30
        while not fake.num_left:
            assert time.monotonic() < deadline_s, "the connection is still open"
            time.sleep(0.05)
        fake.texts = ["Second", " answer"]
        terminal.type("\x03")
        terminal.wait_for(PROMPT)
        terminal.type("Second question\r")
        terminal.wait_for("Second answer")
        # What came before the interruption was said.
        said = fake.requests[-1]["messages"]
        assert [message["role"] for message in said] == ["user", "assistant", "user"]
        assert said[1]["content"].startswith("word0 word1 word2 word3 ")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.end() == 0


def test_hostile_text_is_shown_escaped(fake: Any) -> None:
    fake.texts = ["\x1b]0;owned\x07", "\x1b", "[2J", "\u202eright", "\r\x9bx", "\x1b[31m[bold]red[/bold]"]
    with start(fake) as terminal:
        terminal.wait_for(PROMPT)
        for command in ("Hello\r", "/side\r", "Hello\r"):
            terminal.type(command)
            terminal.wait_for("careful> ")
        terminal.type("/quit\r")
        assert terminal.end() == 0
        assert b"owned" in terminal.written and b"[bold]red[/bold]" in terminal.written
        for sequence in (b"\x1b]0", b"\x1b[2J", b"\xe2\x80\xae", b"\xc2\x9b", b"\x07", b"\x1b[31m"):
            assert sequence not in terminal.written, sequence


def test_a_refusal_changes_nothing(fake: Any) -> None:
    with start(fake) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("One\r")
        terminal.wait_for("lives.")
        terminal.wait_for(PROMPT)
        fake.refusal = 400, b'{"error": {"message": "Too\\nstrong.\\u001b[2J", "code": "steering_strength_invalid"}}'
        fake.refusal = fake.refusal[0], fake.refusal[1].replace(b'"code"', b'"type": "x", "code"')
        for line in ("Two\r", "/retry\r", "/profile other\r"):
            terminal.type(line)
            terminal.wait_for("error: Too strong.\\x1b[2J (steering_strength_invalid)")
            terminal.wait_for(PROMPT)
        fake.refusal = None
        terminal.type("Three\r")
        terminal.wait_for("lives.")
        assert [message["content"] for message in fake.requests[-1]["messages"]] == ["One", "Nine lives.", "Three"]


def test_narrow_terminal_and_no_colour(fake: Any) -> None:
    fake.texts = ["word " * 30]
    with start(fake, "--side", num_columns=32, NO_COLOR="1") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("Hello\r")
        terminal.wait_for("[unsteered; ")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.end() == 0
        lines = terminal.written.decode().splitlines()
        headings = [line for line in lines if line.endswith("careful\x1b[0m")]
        assert headings and not any("unsteered" in line for line in headings)
        # Colours are 30 to 49 and 90 to 107; bold, dim and reverse are none.
        codes = {code for part in terminal.written.split(b"\x1b[")[1:] for code in part.partition(b"m")[0].split(b";")}
        assert not {code for code in codes if code.isdigit() and 30 <= int(code) <= 107}


def test_answers_higher_than_the_terminal_show_their_end(fake: Any) -> None:
    fake.texts, fake.pause_s = [f"line{number}\n" for number in range(60)], 0.02
    with start(fake, "--side", num_lines=12) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("Hello\r")
        terminal.wait_for("line40")
        terminal.wait_for("[unsteered; ")
        terminal.wait_for(PROMPT)
        # The first picture with the last line; after it, the whole answers are shown.
        pictures = terminal.written[: terminal.written.index(b"line59")]
        assert b"line30" not in pictures[pictures.rindex(b"unsteered") :]


def test_bytes_that_are_no_text_do_not_end_the_chat(fake: Any) -> None:
    with start(fake, PYTHONIOENCODING="ascii") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("Caf\u00e9\r")
        terminal.wait_for("lives.")
        terminal.wait_for(PROMPT)
        assert fake.requests[-1]["messages"][0]["content"] == "Caf??"
        terminal.type("\x04")
        assert terminal.end() == 0


class TestOnce:
    """Without a terminal as standard input."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No key of the user's, and a width that does not depend on where tests run."""
        monkeypatch.delenv("EXPERTSTEER_API_KEY", raising=False)
        monkeypatch.setenv("COLUMNS", "80")

    @pytest.fixture
    def once(
        self, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str, str]]:
        """Run the command; its exit status, standard output and standard error."""

        def run(*arguments: str, text: str = "") -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
            status = chat.run(parser_of("chat", chat).parse_args(["--server", fake.url, *arguments]))
            return status, *capsys.readouterr()

        return run

    def test_answer_alone_is_on_standard_output(self, fake: Any, once: Callable[..., tuple[int, str, str]]) -> None:
        status, out, errors = once("--profile", "careful", text="Hello\n")
        assert (status, out) == (0, "Nine lives.\n")
        assert "careful at 0.5, all, 12 tokens steered" in errors
        assert fake.requests[-1]["messages"] == [{"role": "user", "content": "Hello"}]
        assert fake.requests[-1]["steering_profile"] == {"name": "careful"}

    def test_piped_slashes_are_text(self, fake: Any, once: Callable[..., tuple[int, str, str]]) -> None:
        once(text="/quit")
        assert fake.requests[-1]["messages"][0]["content"] == "/quit"

    def test_side_by_side_without_styles(self, fake: Any, once: Callable[..., tuple[int, str, str]]) -> None:
        said = iter([["Nine lives."], ["Nine cats."]])
        events = fake.events
        fake.events = lambda body: events(body) if not setattr(fake, "texts", next(said)) else None
        status, out, _ = once("--profile", "careful", "--side", "--once", "Hello")
        assert status == 0 and "\x1b" not in out
        words = out.split()
        assert words[:2] == ["unsteered", "careful"] and sorted(words[2:]) == ["*cats.*", "*lives.*", "Nine", "Nine"]

    def test_keys(
        self, fake: Any, once: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EXPERTSTEER_API_KEY", "secret")
        once("--once", "Hello")
        (tmp_path / "key").write_text("other\n")
        once("--once", "Hello", "--key-file", str(tmp_path / "key"))
        assert fake.keys == ["Bearer secret", "Bearer other"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--once", " "), "There is no question"),
            (("--once", "x", "--strength", "1"), "need a --profile"),
            (("--once", "x", "--profile", "carefull"), "near names: careful. (steering_profile_not_found)"),
            (("--once", "x", "--model", "none"), "(bad_argument)"),
            (("--once", "x", "--key-file", "/no/such/file"), "/no/such/file"),
            (("--once", "x", "--server", "ftp://x"), "no address of a server"),
        ],
    )
    def test_mistakes(self, once: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], words: str) -> None:
        status, out, errors = once(*arguments)
        assert status == 1 and out == "" and words in errors and errors.count("\n") == 1

    def test_no_receipt(self, fake: Any, once: Callable[..., tuple[int, str, str]]) -> None:
        fake.gives_receipts = False
        status, _, errors = once("--once", "Hello", "--profile", "careful")
        assert status == 1 and "(receipt_missing)" in errors

    def test_characters_that_the_terminal_does_not_have(self, fake: Any) -> None:
        fake.texts = ["été 日"]
        command = [sys.executable, "-m", "server.cli", "chat", "--server", fake.url, "--once", "Hello"]
        variables = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, capture_output=True, env=variables, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, b"\\xe9t\\xe9 \\u65e5\n")
