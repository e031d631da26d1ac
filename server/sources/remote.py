"""Bundles from a model hub or an object store, held against a digest that the caller knows."""

import asyncio
import re
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from pathlib import Path

from artifacts.errors import quoted
from server.sources import hub, object_store
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import Received
from server.sources.upload import receive

SCHEMES = frozenset({"hf", "s3"})
MAX_ADDRESS_CHARACTERS = 2048
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class RemoteSources:
    """The schemes that the operator has enabled."""

    def __init__(
        self, enabled: Collection[str], *, idle_timeout_s: float = 30.0, total_timeout_s: float = 600.0
    ) -> None:
        """Take the schemes of the configuration.

        Args:
            enabled: of `SCHEMES`.
            idle_timeout_s: the longest wait for the answer and for each piece of it.
            total_timeout_s: the longest transfer.

        Raises:
            SourceError: an unknown scheme, or its package is not installed (`scheme_disabled`, `missing_package`).
        """
        if unknown := frozenset(enabled) - SCHEMES:
            message = f"there is no remote source {quoted(min(unknown))}; the known ones are hf and s3"
            raise SourceError(SourceErrorCode.SCHEME_DISABLED, message)
        if "s3" in enabled:
            object_store.require_package()
        self._enabled = frozenset(enabled)
        self._idle_timeout_s, self._total_timeout_s = idle_timeout_s, total_timeout_s

    async def fetch(self, uri: str, digest: str, target: Path, max_bytes: int) -> Received:
        """Download `uri` to the new file `target`.

        Args:
            uri: `hf://ORGANISATION/REPOSITORY@COMMIT/PATH` with a commit of 40 hexadecimal digits, or `s3://BUCKET/KEY`.
            digest: "sha256:" and 64 hexadecimal digits: what the bytes must hash to.
            target: must not exist; removed again on any error.
            max_bytes: the longest file taken.

        Raises:
            SourceError: `scheme_disabled`, `bad_address`, `bad_name`, `bad_digest`, `not_found`, `refused`,
                `bad_redirect`, `unavailable`, `timeout`, `empty`, `too_large`, `digest_mismatch`, `no_space`,
                `storage_failed`.
        """
        if not _DIGEST.fullmatch(digest):
            message = f"the digest {quoted(digest)} is not 'sha256:' and 64 lower-case hexadecimal digits; state it so"
            raise SourceError(SourceErrorCode.BAD_DIGEST, message)
        try:
            async with asyncio.timeout(self._total_timeout_s), aclosing(self._chunks(uri, max_bytes)) as chunks:
                received = await receive(chunks, target, max_bytes, idle_timeout_s=self._idle_timeout_s)
        except TimeoutError:
            message = f"the transfer took longer than {self._total_timeout_s:g} s; try again"
            raise SourceError(SourceErrorCode.TIMEOUT, message) from None
        if received.digest != digest:
            await asyncio.to_thread(target.unlink)
            message = f"the bytes hash to {received.digest} and not to {digest}; correct the digest or the address"
            raise SourceError(SourceErrorCode.DIGEST_MISMATCH, message)
        return received

    def _chunks(self, uri: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
        # Length first, and never the address in these messages: it may hold a password of a form we do not take.
        if len(uri) > MAX_ADDRESS_CHARACTERS:
            message = f"the address has {len(uri)} characters and the limit is {MAX_ADDRESS_CHARACTERS}; shorten it"
            raise SourceError(SourceErrorCode.BAD_ADDRESS, message)
        scheme, separator, _ = uri.partition("://")
        if not separator or scheme not in SCHEMES:
            message = "the address must begin with hf:// or s3://; upload the file instead"
            raise SourceError(SourceErrorCode.BAD_ADDRESS, message)
        if scheme not in self._enabled:
            message = f"{scheme}:// addresses are not enabled; start the server with --steering-remote {scheme}"
            raise SourceError(SourceErrorCode.SCHEME_DISABLED, message)
        if scheme == "hf":
            return hub.read(hub.parse(uri), max_bytes)
        return object_store.read(object_store.parse(uri), max_bytes)
