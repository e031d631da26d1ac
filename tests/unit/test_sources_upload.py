"""Receiving a bundle: the bytes arrive whole, or nothing stays."""

import asyncio
import hashlib
import os
import resource
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import BLOCK_BYTES, IncomingFile
from server.sources.upload import receive


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _stalled(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    await asyncio.sleep(3600)


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=64), max_size=8))
def test_any_division_into_pieces_gives_the_same_file(tmp_path: Path, pieces: list[bytes]) -> None:
    target, content = tmp_path / "new", b"".join(pieces)
    if not content:
        with pytest.raises(SourceError, match="0 bytes") as caught:
            asyncio.run(receive(_pieces(*pieces), target, 1000))
        assert caught.value.code == SourceErrorCode.EMPTY
        assert not target.exists()
        return
    received = asyncio.run(receive(_pieces(*pieces), target, len(content)))
    assert target.read_bytes() == content
    assert received == (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    target.unlink()


async def test_several_blocks_and_pieces_larger_than_a_block(tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in (BLOCK_BYTES - 1, 3, 2 * BLOCK_BYTES + 7, 0, 1)]
    content = b"".join(pieces)
    received = await receive(_pieces(*pieces), tmp_path / "new", len(content))
    assert (tmp_path / "new").read_bytes() == content
    assert received.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


async def test_the_file_is_private_and_new(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        await receive(_pieces(b"x"), tmp_path / "new", 10)
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["file", "link"])
async def test_what_is_there_is_not_overwritten_nor_removed(tmp_path: Path, kind: str) -> None:
    other, target = tmp_path / "other", tmp_path / "new"
    other.write_bytes(b"precious")
    if kind == "file":
        target.write_bytes(b"precious")
    else:
        target.symlink_to(other)
    with pytest.raises(SourceError) as caught:
        await receive(_pieces(b"x"), target, 10)
    assert caught.value.code == SourceErrorCode.STORAGE_FAILED
    assert target.read_bytes() == other.read_bytes() == b"precious"


async def test_one_byte_over_the_limit_is_refused_and_an_endless_sender_is_not_read_on(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 4096
            yield bytes(4096)

    for chunks in (_pieces(bytes(100), b"x"), endless()):
        with pytest.raises(SourceError, match="limit is 100") as caught:
            await receive(chunks, tmp_path / "new", 100)
        assert caught.value.code == SourceErrorCode.TOO_LARGE
        assert not list(tmp_path.iterdir())
    assert sent <= BLOCK_BYTES + 4096


async def test_a_sender_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    class ClientGoneError(Exception):
        pass

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(BLOCK_BYTES)
        raise ClientGoneError

    before = _num_descriptors()
    with pytest.raises(ClientGoneError):
        await receive(broken(), tmp_path / "new", 10 * BLOCK_BYTES)
    assert not list(tmp_path.iterdir())
    assert _num_descriptors() == before


async def test_a_sender_that_stalls_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"0\.05 s") as caught:
        await receive(_stalled(b"x"), tmp_path / "new", 10, idle_timeout_s=0.05)
    assert caught.value.code == SourceErrorCode.TIMEOUT
    assert not list(tmp_path.iterdir())


async def test_cancelled_while_waiting_leaves_nothing(tmp_path: Path) -> None:
    before = _num_descriptors()
    task = asyncio.create_task(receive(_stalled(bytes(BLOCK_BYTES)), tmp_path / "new", 2 * BLOCK_BYTES))
    while not (tmp_path / "new").exists() or (tmp_path / "new").stat().st_size == 0:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list(tmp_path.iterdir())
    assert _num_descriptors() == before


@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_in_the_middle_of_a_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    original = os.write

    def slow_write(descriptor: int, data: memoryview) -> int:
        writing.set()
        go_on.wait(10)
        return original(descriptor, data)

    before = _num_descriptors()
    task = asyncio.create_task(receive(_pieces(bytes(BLOCK_BYTES)), tmp_path / "new", 2 * BLOCK_BYTES))
    # Until the first write begins, which keeps the slow function.
    with monkeypatch.context() as patch:
        patch.setattr("server.sources.incoming_file.os.write", slow_write)
        while not writing.is_set():
            await asyncio.sleep(0.005)
        patch.undo()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.02)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        while list(tmp_path.iterdir()):
            await asyncio.sleep(0.005)
    assert _num_descriptors() == before


@pytest.fixture
def small_disk() -> Iterator[int]:
    """The kernel refuses bytes after the first 64 KiB of any file, as a full disk does."""
    limit = 64 * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_told_apart_and_leaves_nothing(tmp_path: Path, small_disk: int) -> None:
    with pytest.raises(SourceError, match="free space") as caught:
        await receive(_pieces(bytes(2 * small_disk)), tmp_path / "new", 1 << 30)
    assert caught.value.code == SourceErrorCode.NO_SPACE
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())


async def test_a_missing_folder_is_the_servers_fault(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        await receive(_pieces(b"x"), tmp_path / "absent" / "new", 10)
    assert caught.value.code == SourceErrorCode.STORAGE_FAILED


def test_a_write_after_the_end_fails(tmp_path: Path) -> None:
    incoming = IncomingFile(tmp_path / "new", 10)
    incoming.discard()
    incoming.discard()
    with pytest.raises(ValueError, match="closed"):
        incoming.write(b"x")
    assert not list(tmp_path.iterdir())
