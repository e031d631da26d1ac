"""The client of the admin API: what it sends, repeats and refuses."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.admin_schema import ProfileSpec
from server.client import SteeringClient, SteeringClientError

DROP = b""
INFO = (
    b'{"name": "medical", "description": "", "bundle": "sha256:1", "strength": 1, "maximum_strength": 2, "scope": '
    b'"all", "layers": [1], "exclude": [], "generation": 4, "changed_at": "2026-01-01T00:00:00Z", "changed_by": "x",'
    b' "allowed_keys": null, "a_new_field": 1}'
)


@dataclass
class Scripted:
    """A server that gives prepared answers, (status, body), one after the other; `DROP` closes without one."""

    url: str
    answers: list[tuple[int, bytes] | bytes]
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """An HTTP server of its own for each test."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            script.seen.append((self.command, self.path, headers, body))
            answer = script.answers.pop(0)
            self.close_connection = True
            if isinstance(answer, bytes):
                return
            self.send_response(answer[0])
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_GET = do_PUT = do_POST = do_DELETE = _answer

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = Scripted(f"http://127.0.0.1:{server.server_port}", [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield script
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(admin: Any) -> Iterator[SteeringClient]:
    """A client with the write key."""
    with SteeringClient(admin.url, admin.write_key) as client:
        yield client


class TestCalls:
    def test_whole_life_of_a_profile(
        self, admin: Any, client: SteeringClient, bundle: Path, other_bundle: Path
    ) -> None:
        client.wait_ready(5)
        first, second = client.upload(bundle), client.upload(other_bundle)
        assert first.created and not client.upload(bundle).created and first.name == "medical"
        answer = client.put_profile("medical", ProfileSpec(bundle=first.digest, strength=0.5), must_be_new=True)
        assert answer.changed and answer.strength == 0.5
        moved = client.put_profile("medical", ProfileSpec(bundle=second.digest), if_match=answer.generation)
        assert moved.bundle == second.digest and moved.previous is not None and moved.previous.settings is not None
        assert not client.put_profile("medical", ProfileSpec(bundle=second.digest[:20]), dry_run=True).changed
        assert client.rollback("medical", if_match=moved.generation).bundle == first.digest
        assert client.rollback("medical", to=moved.generation).bundle == second.digest
        assert [profile.name for profile in client.profiles()] == ["medical"]
        assert [version.action for version in client.profile("medical").history] == [
            "rollback",
            "rollback",
            "put",
            "put",
        ]
        assert len(client.profile("medical", limit=1, before=moved.generation).history) == 1
        assert sorted(each.digest for each in client.bundles()) == sorted((first.digest, second.digest))
        assert len(client.bundle(first.digest[:16]).residency) == 2
        assert client.manifest(first.digest[:16]).name == "medical"
        assert [row.layer for row in client.tensors(first.digest[:16]).rows] == [2, 5]
        assert client.root().names == ["team/0.safetensors", "team/1.safetensors"]
        assert client.status().workers[1].rank == 1
        assert client.audit(limit=1).entries[0].target == "medical"
        client.delete_profile("medical", drain=True, timeout_s=1, if_match=client.profile("medical").generation)
        client.delete_bundle(first.digest)
        assert [each.digest for each in client.bundles()] == [second.digest] and client.profiles() == []

    def test_upload_streams_and_reports(self, admin: Any, client: SteeringClient, tmp_path: Path) -> None:
        path = tmp_path / "no-bundle"
        path.write_bytes(bytes(3 * 1024 * 1024 + 5))
        progress: list[tuple[int, int]] = []
        with pytest.raises(SteeringClientError) as refusal:
            client.upload(path, signature=b"s", on_progress=lambda *step: progress.append(step))
        assert (refusal.value.status, refusal.value.code) == (400, "steering_bundle_invalid")
        size = path.stat().st_size
        assert [sent for sent, _ in progress] == [1 << 20, 2 << 20, 3 << 20, size] and progress[-1][1] == size
        fields = admin.calls[-1][1]
        assert fields["signature"] == b"s" and fields["expected_digest"].startswith("sha256:")

    def test_dry_run(self, admin: Any, client: SteeringClient, bundle: Path) -> None:
        answer = client.upload(bundle, dry_run=True)
        assert answer.dry_run and answer.created and client.bundles() == []

    @pytest.mark.parametrize("key", ["wrong", None])
    def test_refused_before_the_body_is_read(self, admin: Any, tmp_path: Path, key: str | None) -> None:
        path = tmp_path / "large"
        path.write_bytes(bytes(32 << 20))
        with SteeringClient(admin.url, key) as client, pytest.raises(SteeringClientError) as refusal:
            client.upload(path)
        assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
        assert not admin.calls

    def test_other_sources(self, admin: Any, client: SteeringClient) -> None:
        for call in (
            lambda: client.add_from_root("a/b.safetensors", dry_run=True),
            lambda: client.add_from_remote("s3://a/b", f"sha256:{'0' * 64}"),
        ):
            with pytest.raises(SteeringClientError) as refusal:
                call()
            assert (refusal.value.status, refusal.value.code) == (403, "steering_source_refused")
        assert [name for name, _ in admin.calls] == ["add_from_root", "add_from_remote"]

    def test_names_cannot_leave_their_place(self, admin: Any, client: SteeringClient) -> None:
        for name in ("../bundles", "a/b", "a?dry_run=1", "a#b", "ä", "A"):
            with pytest.raises(SteeringClientError) as refusal:
                client.profile(name)
            assert refusal.value.status in (400, 404), name
        for name in ("", ".", ".."):
            with pytest.raises(SteeringClientError) as refusal:
                client.profile(name)
            assert refusal.value.code == "bad_argument"

    def test_specification_is_checked_here(self) -> None:
        for fields in ({"bundle": "latest"}, {"bundle": "sha256:12345678", "strength": float("nan")}):
            with pytest.raises(ValidationError):
                ProfileSpec(**fields)  # type: ignore[arg-type]


class TestFiles:
    def test_no_regular_file(self, client: SteeringClient, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(SteeringClientError, match="not a regular file"):
            client.upload(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises((OSError, SteeringClientError)):
                client.upload(path)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_file_that_changes_while_sent(
        self, admin: Any, client: SteeringClient, tmp_path: Path, change: int
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(3 << 20))

        def resize(*_: int) -> None:
            os.truncate(path, (3 << 20) + change)

        with pytest.raises(SteeringClientError, match="changed while it was sent"):
            client.upload(path, on_progress=resize)
        assert client.bundles() == []


class TestRepetition:
    def test_repeats_what_is_safe(self, scripted: Scripted, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"bytes")
        spec = ProfileSpec(bundle="sha256:12345678")
        calls: tuple[Callable[[SteeringClient], Any], ...] = (
            lambda client: client.profiles(),
            lambda client: client.put_profile("a", spec),
            lambda client: client.upload(tmp_path / "file"),
        )
        for call in calls:
            scripted.seen.clear()
            scripted.answers = [DROP, DROP, (418, b'{"error": {"message": "No.", "type": "t", "code": "teapot"}}')]
            with SteeringClient(scripted.url) as client, pytest.raises(SteeringClientError) as error:
                call(client)
            assert (error.value.status, error.value.code, str(error.value)) == (418, "teapot", "No.")
            assert len(scripted.seen) == 3 and len({entry[3] for entry in scripted.seen}) == 1

    def test_does_not_repeat_what_may_have_been_done(self, scripted: Scripted) -> None:
        spec = ProfileSpec(bundle="sha256:12345678")
        calls: tuple[Callable[[SteeringClient], Any], ...] = (
            lambda client: client.rollback("a"),
            lambda client: client.delete_profile("a"),
            lambda client: client.put_profile("a", spec, if_match=3),
            lambda client: client.put_profile("a", spec, must_be_new=True),
        )
        for call in calls:
            scripted.seen.clear()
            scripted.answers = [DROP]
            with SteeringClient(scripted.url) as client, pytest.raises(SteeringClientError) as error:
                call(client)
            assert error.value.status is None and error.value.code == "unreachable" and len(scripted.seen) == 1

    def test_nobody_there(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            with SteeringClient(url, timeout_s=2) as client, pytest.raises(SteeringClientError, match=url):
                client.rollback("a")

    def test_refusals_are_not_repeated(self, scripted: Scripted) -> None:
        scripted.answers = [(503, b"<html>Bad gateway</html>")]
        with SteeringClient(scripted.url) as client, pytest.raises(SteeringClientError) as error:
            client.profiles()
        assert (error.value.status, error.value.code) == (503, "bad_answer") and len(scripted.seen) == 1


class TestAnswers:
    def test_follows_pages(self, scripted: Scripted) -> None:
        pages = [b'{"profiles": [%s], "next": "c1"}' % INFO, b'{"profiles": [%s], "next": null}' % INFO]
        scripted.answers = [(200, page) for page in pages]
        with SteeringClient(scripted.url) as client:
            assert [profile.generation for profile in client.profiles()] == [4, 4]
        assert [entry[1] for entry in scripted.seen] == ["/v1/steering/profiles", "/v1/steering/profiles?cursor=c1"]

    @pytest.mark.parametrize("body", [b"", b"[]", b"not JSON", b'{"profiles": 1}', b'{"detail": "Not Found"}'])
    def test_answer_of_something_else(self, scripted: Scripted, body: bytes) -> None:
        for status in (200, 404):
            scripted.answers = [(status, body)]
            with SteeringClient(scripted.url) as client, pytest.raises(SteeringClientError) as error:
                client.profiles()
            assert (error.value.status, error.value.code) == (status, "bad_answer")

    def test_key_goes_nowhere_else(self, scripted: Scripted) -> None:
        scripted.answers = [(307, b"")]
        with SteeringClient(scripted.url, "secret-key") as client, pytest.raises(SteeringClientError) as error:
            client.profiles()
        assert [entry[1] for entry in scripted.seen] == ["/v1/steering/profiles"]
        assert scripted.seen[0][2]["authorization"] == "Bearer secret-key" and "secret-key" not in str(error.value)

    def test_upload_names_its_size(self, scripted: Scripted, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"bytes")
        scripted.answers = [(500, b"")]
        with SteeringClient(scripted.url) as client, pytest.raises(SteeringClientError):
            client.upload(tmp_path / "file")
        headers = scripted.seen[0][2]
        assert (
            headers["content-length"] == "5" and "transfer-encoding" not in headers and scripted.seen[0][3] == b"bytes"
        )
        # SHA-256 of "bytes".
        assert headers["x-steering-digest"] == "sha256:277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"

    def test_wait_ready(self, scripted: Scripted) -> None:
        scripted.answers = [(503, b""), DROP, (200, b"")]
        with SteeringClient(scripted.url) as client:
            client.wait_ready(20)
            assert len(scripted.seen) == 3
            scripted.answers = [(503, b"")] * 9
            with pytest.raises(SteeringClientError, match="503") as error:
                client.wait_ready(0.3)
        assert error.value.code == "not_ready"


@pytest.mark.parametrize(
    ("url", "key"),
    [
        *(("ftp://a", None), ("a:80", None), ("", None), ("http://", None)),
        *(("http://a..b:8000", None), (f"http://{'a' * 64}", None), ("http://a", ""), ("http://a", "a\nb: c")),
    ],
)
def test_what_cannot_be_an_address_or_a_key(url: str, key: str | None) -> None:
    with pytest.raises(SteeringClientError) as error:
        SteeringClient(url, key)
    assert error.value.code == "bad_argument"


def test_client_loads_no_server() -> None:
    heavy = {"vllm", "fastapi", "starlette", "torch", "uvicorn"}
    program = f"import sys, server.client; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
