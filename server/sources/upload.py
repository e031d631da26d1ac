"""Bytes that arrive in pieces, streamed to a file off the event loop."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import BLOCK_BYTES, IncomingFile, Received


async def receive(
    chunks: AsyncIterator[bytes], target: Path, max_bytes: int, *, idle_timeout_s: float = 60.0
) -> Received:
    """Write `chunks` to the new file `target` and hash them on the way.

    On any error, a sender that goes away and cancellation included, `target` is removed before the error goes on.

    Args:
        chunks: the content in order; pieces may be empty.
        target: must not exist.
        max_bytes: the longest content taken. At most one MiB more than this is ever read.
        idle_timeout_s: the longest wait for the next piece.

    Returns:
        Length and digest of the file, which is on disk for good.

    Raises:
        SourceError: `empty`, `too_large`, `timeout`, `no_space`, `storage_failed`.
    """
    incoming = IncomingFile(target, max_bytes)
    try:
        block = bytearray()
        while (chunk := await _next(chunks, idle_timeout_s)) is not None:
            block += chunk
            if len(block) >= BLOCK_BYTES:
                await asyncio.to_thread(incoming.write, block)
                block.clear()
        if block:
            await asyncio.to_thread(incoming.write, block)
        return await asyncio.to_thread(incoming.keep)
    except BaseException:
        # Shielded, and in a thread: a second cancellation must not leave the file, nor a slow disk stop the loop.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, incoming.discard))
        raise


async def _next(chunks: AsyncIterator[bytes], idle_timeout_s: float) -> bytes | None:
    try:
        async with asyncio.timeout(idle_timeout_s):
            return await anext(chunks, None)
    except TimeoutError:
        message = f"no byte of the bundle arrived for {idle_timeout_s:g} s; send it again"
        raise SourceError(SourceErrorCode.TIMEOUT, message) from None
