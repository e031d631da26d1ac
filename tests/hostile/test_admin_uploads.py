"""Uploads that no honest sender makes: nothing of them stays, and requests that run meanwhile notice nothing."""

import gzip
import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from damaged import upload_damaged
from traffic import Address
from waiting import wait_until

pytestmark = pytest.mark.engine

NUM_DAMAGED = 150
NUM_AT_ONCE = 20
# Of the server.
MAX_BUNDLE_MIB = 2
SOCKET_TIMEOUT_S = 10
BUNDLES = "/v1/steering/bundles"
BINARY = {"content-type": "application/octet-stream"}


@pytest.fixture(autouse=True)
def nothing_stays(operated: Any) -> Iterator[None]:
    """Neither a half file, nor a bundle, nor a change of the state beyond those that were acknowledged."""
    yield
    assert operated.admin.bundles() == []
    assert operated.admin.profiles() == []
    assert operated.admin.status().workers[0].rows_used == 0
    assert list((operated.registry / "incoming").iterdir()) == []
    assert list((operated.registry / "bundles").iterdir()) == []


def send(operated: Any, content: Any, **headers: str) -> Any:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return operated.server.client.post(BUNDLES, content=content, headers=BINARY | headers)


def refused(response: Any, status: int, code: str) -> str:
    """Assert the refusal; its sentence."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    assert error["message"].isprintable()
    message: str = error["message"]
    return message


@pytest.mark.parametrize("kind", ["shipped", "every kind"])
def test_damaged_bundles_under_traffic(
    operated: Any,
    bundle_files: dict[str, Path],
    make_bundle: Callable[..., Path],
    kind_examples: dict[str, Any],
    kind: str,
) -> None:
    good = bundle_files["careful"]
    if kind == "every kind":
        kinds = dict(kind_examples)
        steps = [kinds.pop("condition"), kinds.pop("add") | {"gate": "open"}, *kinds.values()]
        good = make_bundle("kinds", [number % 6 for number in range(len(steps))], 5, steps)
    key = operated.server.client.headers["authorization"].removeprefix("Bearer ")
    found = upload_damaged(Address(operated.server.url, key), bundle_files["early"], good, NUM_DAMAGED)
    assert found.problems == []
    assert found.files >= NUM_DAMAGED
    assert found.statuses["400"] > NUM_DAMAGED / 2
    assert found.answers > 10


def test_in_disguise(operated: Any, bundle_files: dict[str, Path]) -> None:
    good = bundle_files["early"].read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"weight": [1.0]}))
    for content in (archive.getvalue(), pickle.dumps({"weight": [1.0]}), gzip.compress(good), b"\x93NUMPY" + good):
        refused(send(operated, content), 400, "steering_bundle_invalid")


def test_empty(operated: Any) -> None:
    assert "0 bytes" in refused(send(operated, b""), 400, "steering_bundle_invalid")


@pytest.mark.parametrize("is_announced", [True, False])
def test_larger_than_the_cap(operated: Any, bundle_files: dict[str, Path], is_announced: bool) -> None:
    good = bundle_files["early"].read_bytes()
    pieces = [good, *[bytes(2**16)] * 64]
    content: Any = b"".join(pieces) if is_announced else iter(pieces)
    message = refused(send(operated, content), 413, "steering_too_large")
    assert str(MAX_BUNDLE_MIB * 2**20) in message


def test_endless(operated: Any) -> None:
    """The answer does not wait for the end, and nothing of what comes after the cap is kept."""
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    most = 0
    with connection(operated, b"Transfer-Encoding: chunked\r\n\r\n") as sender:
        for _ in range(512):
            sender.sendall(piece)
            incoming = [path.stat().st_size for path in (operated.registry / "incoming").glob("*") if path.exists()]
            most = max(most, sum(incoming))
        sender.settimeout(SOCKET_TIMEOUT_S)
        assert sender.recv(64).startswith(b"HTTP/1.1 413 ")
    assert most <= (MAX_BUNDLE_MIB + 1) * 2**20


@pytest.mark.parametrize("is_chunked", [True, False])
def test_sender_that_goes_away(operated: Any, bundle_files: dict[str, Path], is_chunked: bool) -> None:
    good = bundle_files["early"].read_bytes()
    half = good[: len(good) // 2]
    incoming = operated.registry / "incoming"
    generation = operated.admin.status().generation_desired
    if is_chunked:
        head, body = b"Transfer-Encoding: chunked\r\n\r\n", f"{len(half):x}\r\n".encode() + half + b"\r\n"
    else:
        head, body = f"Content-Length: {len(good)}\r\n\r\n".encode(), half
    with connection(operated, head) as sender:
        sender.sendall(body)
        wait_until(lambda: any(incoming.iterdir()))
    wait_until(lambda: not any(incoming.iterdir()))
    assert operated.admin.status().generation_desired == generation
    # Where it went away stands in the audit log; it did not count as done.
    wait_until(lambda: operated.admin.audit(limit=1).entries[0].outcome in ("failed", "refused"))


def connection(operated: Any, head: bytes) -> socket.socket:
    """An upload of which only the head was sent."""
    address = urlsplit(operated.server.url)
    sender = socket.create_connection((address.hostname, address.port))
    key = operated.server.client.headers["authorization"].encode()
    sender.sendall(
        b"POST " + BUNDLES.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: " + key + b"\r\n"
        b"Content-Type: application/octet-stream\r\n" + head
    )
    return sender


def test_other_bytes_than_announced(operated: Any, bundle_files: dict[str, Path]) -> None:
    good = bundle_files["early"].read_bytes()
    wrong = f"sha256:{'0' * 64}"
    message = refused(send(operated, good, x_steering_digest=wrong), 409, "steering_digest_mismatch")
    assert wrong in message
    for digest in ("sha256:0", "md5:" + "0" * 32, "\xff" * 4, ""):
        response = operated.server.client.post(
            BUNDLES, content=good, headers={**BINARY, "x-steering-digest": digest.encode("latin-1")}
        )
        assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/zip",
        "multipart/form-data; boundary=x",
        "application/octet-stream, text/html",
        "",
        "\x01",
    ],
)
def test_other_content_types(operated: Any, bundle_files: dict[str, Path], content_type: str) -> None:
    response = operated.server.client.post(
        BUNDLES, content=bundle_files["early"].read_bytes(), headers={"content-type": content_type}
    )
    assert response.status_code in (400, 415), response.text


def test_json_instead_of_a_bundle(operated: Any) -> None:
    client = operated.server.client
    for body in (b"", b"null", b"[]", b"{", b'{"path": "a", "path": "b"}', b'{"path": 1}', b'{"path": "x", "more": 1}'):
        response = client.post(BUNDLES, content=body, headers={"content-type": "application/json"})
        assert 400 <= response.status_code < 500, response.text
    deep = b"[" * 100_000
    response = client.post(BUNDLES, content=deep, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500


@pytest.fixture
def outside(operated: Any, bundle_root: Path, bundle_files: dict[str, Path]) -> Iterator[Path]:
    """A good bundle next to the root, and ways to it from inside."""
    outside = bundle_root.with_name("elsewhere")
    outside.mkdir()
    secret = outside / "secret.safetensors"
    secret.write_bytes(bundle_files["early"].read_bytes())
    made = [bundle_root / "link.safetensors", bundle_root / "folder", bundle_root / "hard.safetensors"]
    made[0].symlink_to(secret)
    made[1].symlink_to(outside, target_is_directory=True)
    os.mkfifo(bundle_root / "pipe")
    (bundle_root / "inner").mkdir()
    (bundle_root / "inner" / "good.safetensors").write_bytes(bundle_files["late"].read_bytes())
    yield secret
    for path in (made[0], made[1], bundle_root / "pipe", bundle_root / "inner" / "good.safetensors", secret):
        path.unlink(missing_ok=True)
    (bundle_root / "inner").rmdir()
    outside.rmdir()


def test_names_that_lead_out_of_the_root(operated: Any, bundle_root: Path, outside: Path) -> None:
    escape = f"{outside.parent.name}/{outside.name}"
    names = [
        "link.safetensors",
        "folder/secret.safetensors",
        "pipe",
        "inner",
        ".",
        "..",
        "/",
        str(outside),
        f"../{escape}",
        f"inner/../../{escape}",
        f"./../{escape}",
        "inner/../link.safetensors",
        f"..%2f{escape}",
        f"..\\{escape}",
        f"\uff0e\uff0e/{escape}",
        f"\u2025/{escape}",
        "inner/good.safetensors\x00.txt",
        "inner//good.safetensors\n",
        "inner/good.safetensors/",
        "\u2170nner/good.safetensors",
        "~/good.safetensors",
        "\ud800",
        "a" * 1024,
        "x/" * 500 + "x",
        "/proc/self/environ",
        "/dev/zero",
        f"file://{outside}",
    ]
    generation = operated.admin.status().generation_desired
    answers = Counter[int]()
    for name in names:
        body = b'{"path": ' + json.dumps(name).encode() + b"}"
        response = operated.server.client.post(BUNDLES, content=body, headers={"content-type": "application/json"})
        answers[response.status_code] += 1
        assert 400 <= response.status_code < 500, (name, response.text)
        # Where the root lies, and what else there is, is nobody's business.
        assert str(bundle_root) not in response.text, name
        assert not re.search(r"root:|PATH=", response.text), name
    assert operated.admin.status().generation_desired == generation
    assert sum(answers.values()) == len(names)


def test_name_inside_the_root(operated: Any, outside: Path) -> None:
    added = operated.admin.add_from_root("inner/good.safetensors")
    assert added.created
    operated.admin.delete_bundle(added.digest)


def test_many_send_the_same_bundle(operated: Any, bundle_files: dict[str, Path]) -> None:
    good = bundle_files["every"].read_bytes()
    responses = operated.server.map(lambda _: send(operated, good), range(NUM_AT_ONCE), NUM_AT_ONCE)
    assert Counter(response.status_code for response in responses) == {201: 1, 200: NUM_AT_ONCE - 1}
    assert len({response.json()["digest"] for response in responses}) == 1
    assert len(operated.admin.bundles()) == 1
    assert operated.admin.status().workers[0].rows_used == 6
    operated.admin.delete_bundle(responses[0].json()["digest"])


def test_sent_and_removed_at_once(operated: Any, bundle_files: dict[str, Path]) -> None:
    """Whoever is told that it is there may be late; but what is there is whole."""
    good = bundle_files["late"].read_bytes()
    digest = operated.admin.upload(bundle_files["late"], dry_run=True).digest

    def act(number: int) -> int:
        if number % 2:
            return int(send(operated, good).status_code)
        return int(operated.server.client.delete(f"{BUNDLES}/{digest}").status_code)

    statuses = Counter(operated.server.map(act, range(4 * NUM_AT_ONCE), NUM_AT_ONCE))
    assert statuses.keys() <= {200, 201, 204, 404, 409}, statuses
    assert statuses[201] > 1
    known = [bundle.digest for bundle in operated.admin.bundles()]
    assert known in ([], [digest])
    assert [path.stem for path in (operated.registry / "bundles").iterdir()] == [each[7:] for each in known]
    # What was loaded for an upload that a removal overtook goes again.
    wait_until(lambda: operated.admin.status().workers[0].bundles == known)
    send(operated, good)
    operated.admin.delete_bundle(digest)


def test_requests_after_all_that(operated: Any, bundle_files: dict[str, Path]) -> None:
    digest = operated.admin.upload(bundle_files["careful"]).digest
    operated.server.client.put("/v1/steering/profiles/after", json={"bundle": digest}).raise_for_status()
    answer = operated.server.complete("What is 7 plus 5?", steering_profile="after", max_tokens=8)
    assert answer["steering"]["bundle"] == digest
    operated.admin.delete_profile("after", drain=True)
    operated.admin.delete_bundle(digest, drain=True)
