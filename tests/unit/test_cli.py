"""The command line: overview, mistakes, and that a command imports only what it needs."""

import json
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from server.cli import GROUP, main

COMMANDS = (
    *("bench", "build", "bundle", "card", "chat", "demo", "eval", "key", "lab", "profile"),
    *("push", "registry", "serve", "step", "vector"),
)
HEAVY = ("torch", "transformers", "vllm", "fastapi")
_HELP = f"""
import json, sys
from server.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
print("RESULT" + json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def run(*arguments: str) -> tuple[int, str, list[str]]:
    """Exit status, output and heavy packages that were imported, of a command in its own process."""
    process = subprocess.run(
        [sys.executable, "-c", _HELP, *arguments], capture_output=True, text=True, timeout=200, check=True
    )
    text, _, result = process.stdout.rpartition("RESULT")
    status, imported = json.loads(result)
    return status, text, imported


def test_commands_are_registered() -> None:
    assert sorted(point.name for point in entry_points(group=GROUP)) == list(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: expertsteer")
    for point in entry_points(group=GROUP):
        assert f"    {point.name} " in text
        assert point.load().HELP.split()[0] in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"expertsteer {version('expertsteer')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serv"], "invalid choice: 'serv'"),
        ([], "the following arguments are required: COMMAND"),
        (["--port", "1"], "error: "),
        (["bundle", "--no-such-flag"], "usage: expertsteer bundle"),
        (["demo", "--port", "x"], "argument --port: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_usage_errors(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


def test_arguments_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expertsteer", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert version("expertsteer") in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    status, text, imported = run(command, "--help")
    assert status == 0
    assert text.startswith(f"usage: expertsteer {command} [-h]")
    assert imported == []


def test_overview_imports_nothing_heavy() -> None:
    assert run("--help")[::2] == (0, [])


def test_help_of_serve_shows_our_flags_and_vllms() -> None:
    status, text, _ = run("serve", "--help")
    assert status == 0
    assert text.startswith("usage: expertsteer serve")
    for flag in ("--steering-bundle", "--steering-rows", "--steering-fingerprint", "--served-model-name"):
        assert f"[{flag} " in text, flag


def test_console_script() -> None:
    script = Path(sys.executable).with_name("expertsteer")
    process = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stdout) == (0, f"expertsteer {version('expertsteer')}\n")
    mistake = subprocess.run([script, "serv"], capture_output=True, text=True, timeout=60, check=False)
    assert mistake.returncode == 2
