"""`expertsteer chat` on a terminal, against a real server."""

import re
import subprocess
import sys
from typing import Any

import pytest
from pseudo_terminal import Terminal

pytestmark = pytest.mark.engine

QUESTION = "What is 7 plus 5?"


def text_of(server: Any, **fields: Any) -> str:
    """The answer of the API."""
    body = {"model": "lab", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0} | fields
    answer: str = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    return answer


def test_conversation(eager: Any, bundles: Any) -> None:
    digest = bundles["careful"].digest
    plain, steered = text_of(eager), text_of(eager, steering_profile="careful")
    assert plain != steered
    with Terminal("chat", "--server", eager.url) as terminal:

        def say(line: str, words: str, prompt: str) -> str:
            """Type a line, and wait for words and then for a prompt."""
            terminal.type(f"{line}\r")
            return terminal.wait_for(words) + terminal.wait_for(prompt)

        terminal.wait_for("unsteered> ")
        assert plain in say(QUESTION, "[unsteered; ", "unsteered> ")
        say("/strength 0.5", "error: No profile is chosen", "unsteered> ")
        say("/side", "error: No profile is chosen", "unsteered> ")
        say("/profiles", "careful", "unsteered> ")
        say("/profile carefull", "near names: careful", "unsteered> ")
        say(f"/profile careful@{digest}", "profile: careful@sha256:", "careful@sha256:")
        say("/profile careful", "profile: careful", "careful> ")
        assert steered in say("/retry", "[careful at 0.5, all, ", "careful> ")
        assert digest in say("/receipt", '"bundle": ', "careful> ")
        say("/strength -0.25", "strength: -0.25", "careful -0.25> ")
        say("/scope response", "scope: response", "careful -0.25 response> ")
        say("/retry", "[careful at -0.25, response, ", "careful -0.25 response> ")
        say("/scope everything", "error: Scope is 'everything', expected one of", "careful -0.25 response> ")
        say("/scope default", "scope: default", "careful -0.25> ")
        say("/strength 99", "strength: 99", "careful 99> ")
        say("/retry", "over its maximum of 0.8. (steering_strength_invalid)", "careful 99> ")
        say("/strength default", "strength: default", "careful> ")
        say("/reset", "Forgotten.", "careful> ")
        say("/retry", "error: There is no question to ask again.", "careful> ")
        say("/side on", "side by side: on", "unsteered | careful> ")
        before = len(terminal.written)
        say(QUESTION, "[careful at 0.5, all, ", "unsteered | careful> ")
        marked = re.findall(rb"\x1b\[1;7m([^\x1b]+)\x1b", terminal.written[before:])
        ours, theirs = set(steered.split()), set(plain.split())
        assert {word.decode() for word in marked} == ours ^ theirs
        say("/profile off", "profile: unsteered", "unsteered> ")
        say("/system You are a clerk.", "system prompt: You are a clerk.", "unsteered> ")
        say("/hlep", "did you mean /help?", "unsteered> ")
        # Arrow keys bring back earlier lines.
        terminal.type("\x1b[A\x1b[A\r")
        terminal.wait_for("system prompt: You are a clerk.")
        terminal.wait_for("unsteered> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_piped(eager: Any) -> None:
    command = [sys.executable, "-m", "server.cli", "chat", "--server", eager.url, "--profile", "careful"]
    done = subprocess.run(command, input=QUESTION, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout == f"{text_of(eager, steering_profile='careful')}\n"
