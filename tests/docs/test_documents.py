"""Documents say what is so: commands parse, files and links exist, rendered parts are current."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from documents import DOCUMENTS, ELSEWHERE, ROOT, SERVER, anchors, blocks, inline_codes, links
from shell_lines import commands

LANGUAGES = {"sh", "python", "js", "yaml", "json", "text", "console", "promql", "html"}
# Commands that a block of output or of plain text must not hide from the tests.
COMMANDS = {
    *("expertsteer", "make", "curl", "pip", "uv", "python", "python3", "npm", "node", "docker", "helm", "kubectl"),
    *("git", "export", "promtool", "openssl", "model_signing"),
}
# Options of other programs that texts name.
_FOREIGN_OPTIONS = {"--build-arg", "--set", "--check"}
_UPPER_CASE = re.compile(r"[A-Z][A-Z_]*")


class Parsed(NamedTuple):
    """What the real parsers say: their options by command, and command lines with what is wrong with them."""

    options: dict[str, list[str]]
    problems: list[list[str]]


def _ask_parsers(lines: Sequence[Sequence[str]]) -> Parsed:
    command = [sys.executable, str(Path(__file__).with_name("parse_commands.py"))]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return Parsed(**json.loads(done.stdout.splitlines()[-1]))


def _only_read() -> list[tuple[str, list[str]]]:
    """Place and words of every command in the blocks that no test runs."""
    return [
        (block.place, words)
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language == "sh" and block.marks & ELSEWHERE
        for words in commands(block.text)
    ]


def _arguments(words: Sequence[str]) -> list[str]:
    """Arguments of `expertsteer` in a command: its own, behind `--`, or those of a container of its image."""
    for number, word in enumerate(words):
        is_program = word == "expertsteer" and (number == 0 or words[number - 1] == "--")
        is_image = list(words[:2]) == ["docker", "run"] and word.startswith("expertsteer/server:")
        if is_program or is_image:
            return list(words[number + 1 :])
    return []


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    found = [arguments for _, words in _only_read() if (arguments := _arguments(words))]
    assert found, "no document has a command for a GPU, a cluster or a container engine"
    return _ask_parsers(found)


def test_commands_that_are_only_read_parse(parsed: Parsed) -> None:
    assert not parsed.problems


def test_files_of_commands_that_are_only_read_exist() -> None:
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    missing = [
        (place, word)
        for place, words in _only_read()
        for word in words
        if re.fullmatch(r"[\w./-]+", word) and "/" in word and word.split("/")[0] in top and not (ROOT / word).exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_say_what_they_are(document: str) -> None:
    for block in blocks(document):
        assert block.language in LANGUAGES, f"{block.place}: the info string names none of {sorted(LANGUAGES)}"
        known = {SERVER} | ELSEWHERE if block.language == "sh" else set()
        assert block.marks <= known, f"{block.place}: {sorted(block.marks - known)}, and {sorted(known)} mean something"
        if block.language == "sh":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_hides_in_output(document: str) -> None:
    for block in blocks(document):
        for line in block.text.splitlines() if block.language in ("text", "console") else ():
            hides = line.startswith("$ ") or line.split(" ")[0] in COMMANDS
            assert not hides, f"{block.place}: {line!r} is a command; put it into a block of sh"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_inside_of_lines_exist(document: str, parsed: Parsed) -> None:
    known = {option for options in parsed.options.values() for option in options} | _FOREIGN_OPTIONS
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in inline_codes(document):
        words = text.split(" ")
        if words[0] == "expertsteer" and len(words) > 1 and not _UPPER_CASE.fullmatch(words[1]):
            for name in words[1].split("|"):
                assert name in parsed.options, f"{document}: `{text}`: there is no command {name}"
            options = {option for name in words[1].split("|") for option in parsed.options[name]}
            named = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
            assert named <= options, f"{document}: `{text}`: there is no {sorted(named - options)}"
        elif words[0].startswith("--") and words[0] != "--":
            assert words[0].split("=")[0] in known, f"{document}: there is no option {words[0]}"
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in targets, f"{document}: `{text}`: the Makefile has no such target"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: there is no {link}"
        if anchor and target.suffix == ".md":
            name = target.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{document}: {name} has no heading #{anchor}"


def test_headings_that_deployments_name_exist() -> None:
    """Runbooks of alerts, links of charts."""
    named = {
        (path.relative_to(ROOT).as_posix(), *match.groups())
        for path in (ROOT / "deploy").rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".json", ".tpl", ".txt")
        for match in re.finditer(r"\b(docs/[\w-]+\.md)#([\w-]+)", path.read_text())
    }
    assert named, "no alert has a runbook"
    missing = [(place, page, anchor) for place, page, anchor in sorted(named) if anchor not in anchors(page)]
    assert not missing


def test_rendered_parts_are_current() -> None:
    command = [sys.executable, "-m", "docs.render", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_index_names_every_page() -> None:
    listed = {link.partition("#")[0] for link in links("docs/README.md")}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


class TestShellLines:
    """The reader of shell scripts sees every command."""

    @pytest.mark.parametrize(
        ("script", "expected"),
        [
            ("a b # c d\ne\n", [["a", "b"], ["e"]]),
            ("a \\\n  b\nc", [["a", "b"], ["c"]]),
            ("X=1 a 'b\nc' | d > e && f", [["a", "b\nc"], ["d"], ["f"]]),
            ("a <b 2>&1\n# only a comment\nc -d '{\"x\": [1]}'", [["a"], ["c", "-d", '{"x": [1]}']]),
        ],
    )
    def test_commands(self, script: str, expected: Any) -> None:
        # A file descriptor in front of a redirection counts as a word, which does no harm to what is asked.
        assert [[word for word in words if word != "2"] for words in commands(script)] == expected


def test_no_page_names_a_folder_of_this_machine() -> None:
    for path in ["README.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]:
        assert str(ROOT) not in (ROOT / path).read_text(), path
