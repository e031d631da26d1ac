"""Every command of the documents is run here, or marked as needing what a test does not have."""

import contextlib
import socket
from pathlib import Path

import pytest
import session
from documents import DOCUMENTS, SERVER, Block, blocks

# Its examples are run by tests/e2e/test_clients.py.
_TESTED_ELSEWHERE = "docs/clients.md"
_RUNNABLE = {
    document: [block for block in blocks(document) if block.runs]
    for document in DOCUMENTS
    if document != _TESTED_ELSEWHERE
}
_TIMEOUT_S = 800


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _parameters() -> list[object]:
    starts = {name: any(SERVER in block.marks for block in found) for name, found in _RUNNABLE.items() if found}
    return [
        pytest.param(name, id=name, marks=[pytest.mark.engine, pytest.mark.slow] if server else [])
        for name, server in starts.items()
    ]


@pytest.mark.timeout(_TIMEOUT_S + 100)
@pytest.mark.parametrize("document", _parameters())
def test_commands_run(document: str, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
    shown = session.run(_RUNNABLE[document], tmp_path, _free_port(), vllm_environment, _TIMEOUT_S)
    assert shown.endswith(f"{session.END}\n"), f"the last block that began did not end well:\n{shown[-6000:]}"


class TestSession:
    """The harness sees what fails."""

    def run(
        self, folder: Path, environment: dict[str, str], *texts: str, marks: str = "", timeout_s: float = 60
    ) -> str:
        made = [Block(f"page:{number}", "sh", frozenset(marks.split()), text) for number, text in enumerate(texts)]
        return session.run(made, folder, _free_port(), environment, timeout_s)

    def test_blocks_share_a_session_in_a_copy(self, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
        shown = self.run(tmp_path, vllm_environment, "x=1; touch made\n", 'echo "x is $x"; ls made README.md\n')
        assert "x is 1" in shown and "made" in shown and shown.endswith(f"{session.END}\n")
        assert not (Path(__file__).parents[2] / "made").exists()

    def test_a_command_that_fails_ends_it(self, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
        shown = self.run(tmp_path, vllm_environment, "echo one\n", "false | cat\necho two\n")
        assert "::: page:1" in shown and "two" not in shown and not shown.endswith(f"{session.END}\n")

    def test_a_server_that_does_not_start(self, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
        shown = self.run(tmp_path, vllm_environment, "echo no model; exit 1\n", marks=SERVER)
        assert "the server is not ready" in shown and "no model" in shown and not shown.endswith(f"{session.END}\n")

    def test_a_server_gets_the_port_and_is_stopped(self, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
        (tmp_path / "health").mkdir()
        (tmp_path / "health" / "ready").write_text("yes")
        start = f"echo $$ >{tmp_path}/pid\nexec python -m http.server 8000 --directory {tmp_path}\n"
        ask = "curl -sf http://localhost:8000/health/ready\n"
        made = [Block("page:1", "sh", frozenset({SERVER}), start), Block("page:2", "sh", frozenset(), ask)]
        shown = session.run(made, tmp_path, _free_port(), vllm_environment, 60)
        assert "yes" in shown and shown.endswith(f"{session.END}\n")
        assert not _lives(int((tmp_path / "server.pid").read_text()))

    def test_what_hangs_is_ended(self, tmp_path: Path, vllm_environment: dict[str, str]) -> None:
        shown = self.run(tmp_path, vllm_environment, "sleep 600\n", timeout_s=1)
        assert not shown.endswith(f"{session.END}\n")


def _lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
