"""Client of the admin API.

with SteeringClient("http://127.0.0.1:8000", key) as client:
    bundle = client.upload(Path("medical.safetensors"))
    client.put_profile("medical", ProfileSpec(bundle=bundle.digest, strength=0.8))
"""

import base64
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from artifacts.errors import quoted
from artifacts.manifest import Manifest
from server.admin_schema import (
    AuditPage,
    BundleAnswer,
    BundleDetail,
    BundleInfo,
    BundleList,
    BundleTensors,
    ProfileAnswer,
    ProfileDetail,
    ProfileInfo,
    ProfileList,
    ProfileSpec,
    Refusal,
    RootList,
    Status,
)

_ROOT = "/v1/steering"
_CHUNK_BYTES = 1 << 20
_PAUSES_S = (0.2, 0.6)
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 5.0

Answer = TypeVar("Answer", bound=BaseModel)
OnProgress = Callable[[int, int], None]


class SteeringClientError(RuntimeError):
    """A call that did not do what was asked. `str(error)` is one sentence.

    Attributes:
        status: HTTP status; None when no answer came.
        code: the server's `error.code`, or of this client: `unreachable`, `not_ready`, `bad_answer`, `bad_argument`.
    """

    def __init__(self, status: int | None, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class SteeringClient:
    """Changes what a server steers with. For one thread at a time.

    A call that found no connection is made again, and so is one whose connection broke, if doing it twice is the same
    as doing it once.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        """Prepare calls; nothing is sent.

        Args:
            url: of the server, without a path of the API.
            key: API key; None for a server without keys.
            timeout_s: how long an answer, and each part of an upload, may take.

        Raises:
            SteeringClientError: the address or the key cannot be one.
        """
        self._timeout_s = timeout_s
        headers = {} if key is None else {"authorization": f"Bearer {checked_key(key)}"}
        self._http = httpx.Client(base_url=checked_url(url), headers=headers, timeout=timeout_s)

    def __enter__(self) -> "SteeringClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def upload(
        self,
        path: Path,
        *,
        dry_run: bool = False,
        signature: bytes | None = None,
        on_progress: OnProgress | None = None,
    ) -> BundleAnswer:
        """Add a bundle from a file here.

        Args:
            path: the bundle.
            dry_run: let the server check it and keep nothing.
            signature: of the file, by model-signing.
            on_progress: called with the bytes sent so far and all of them.

        Raises:
            SteeringClientError: refused, or not reached.
            OSError: the file cannot be read.
        """
        with open(path, "rb", opener=_open_without_waiting) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise SteeringClientError(None, "bad_argument", f"{quoted(str(path), 200)} is not a regular file.")
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            headers = {
                "content-type": "application/octet-stream",
                "content-length": str(state.st_size),
                "x-steering-digest": digest,
            }
            if signature is not None:
                headers |= _signed(signature)
            answer = self._send(
                "POST",
                "/bundles",
                params={"dry_run": dry_run},
                headers=headers,
                content=lambda: _chunks(file, state.st_size, on_progress),
                repeatable=True,
            )
        return _read(answer, BundleAnswer)

    def add_from_root(self, name: str, *, signature: bytes | None = None, dry_run: bool = False) -> BundleAnswer:
        """Add a bundle that lies in the server's bundle root; `name` is its path there."""
        return self._add({"path": name}, signature, dry_run)

    def add_from_remote(
        self, uri: str, digest: str, *, signature: bytes | None = None, dry_run: bool = False
    ) -> BundleAnswer:
        """Let the server fetch a bundle from hf:// or s3://; it must have this digest."""
        return self._add({"uri": uri, "digest": digest}, signature, dry_run)

    def bundles(self) -> list[BundleInfo]:
        """All bundles, by digest."""
        return [bundle for page in self._pages("/bundles", BundleList) for bundle in page.bundles]

    def bundle(self, digest: str) -> BundleDetail:
        """One bundle; `digest` may be a unique prefix."""
        return self._json("GET", f"/bundles/{_part(digest)}", BundleDetail, repeatable=True)

    def manifest(self, digest: str) -> Manifest:
        """All that a bundle says of itself; `digest` may be a unique prefix."""
        return self._json("GET", f"/bundles/{_part(digest)}/manifest", Manifest, repeatable=True)

    def tensors(self, digest: str) -> BundleTensors:
        """The norms of a bundle's rows, and its evidence tensors; `digest` may be a unique prefix."""
        return self._json("GET", f"/bundles/{_part(digest)}/tensors", BundleTensors, repeatable=True)

    def root(self) -> RootList:
        """The files that `add_from_root` could take."""
        return self._json("GET", "/root", RootList, repeatable=True)

    def delete_bundle(self, digest: str, *, drain: bool = False, timeout_s: float = 30.0) -> None:
        """Remove a bundle.

        Args:
            digest: or a unique prefix.
            drain: wait until no request uses it.
            timeout_s: how long to wait for that.
        """
        self._delete(f"/bundles/{_part(digest)}", drain, timeout_s, {})

    def put_profile(
        self,
        name: str,
        spec: ProfileSpec,
        *,
        if_match: int | None = None,
        must_be_new: bool = False,
        dry_run: bool = False,
    ) -> ProfileAnswer:
        """Create a profile, or point it to something else.

        Args:
            name: of the profile.
            spec: what it shall be.
            if_match: do it only while the current version is of this generation.
            must_be_new: do it only if there is no such profile.
            dry_run: let the server check it and change nothing.
        """
        headers = _if_match(if_match) | ({"if-none-match": "*"} if must_be_new else {})
        body = spec.model_dump(mode="json", exclude_none=True)
        # With a precondition, a second try would fail because the first one has done it.
        return self._json(
            "PUT",
            f"/profiles/{_part(name)}",
            ProfileAnswer,
            body,
            {"dry_run": dry_run},
            headers,
            repeatable=not headers,
        )

    def profiles(self) -> list[ProfileInfo]:
        """All profiles that the key may see, by name."""
        return [profile for page in self._pages("/profiles", ProfileList) for profile in page.profiles]

    def profile(self, name: str, *, limit: int = 50, before: int | None = None) -> ProfileDetail:
        """One profile with `limit` entries of its history, those before a generation if one is given."""
        params = {"limit": limit} | ({} if before is None else {"before": before})
        return self._json("GET", f"/profiles/{_part(name)}", ProfileDetail, params=params, repeatable=True)

    def rollback(self, name: str, *, to: int | None = None, if_match: int | None = None) -> ProfileAnswer:
        """Restore an earlier version of a profile.

        Args:
            name: of the profile.
            to: generation of the version; None for the last one that differs from the present.
            if_match: do it only while the current version is of this generation.
        """
        path = f"/profiles/{_part(name)}/rollback"
        return self._json("POST", path, ProfileAnswer, {"to": to}, headers=_if_match(if_match))

    def delete_profile(
        self, name: str, *, drain: bool = False, timeout_s: float = 30.0, if_match: int | None = None
    ) -> None:
        """Delete a profile.

        Args:
            name: of the profile.
            drain: wait until no request uses it.
            timeout_s: how long to wait for that.
            if_match: do it only while the current version is of this generation.
        """
        self._delete(f"/profiles/{_part(name)}", drain, timeout_s, _if_match(if_match))

    def status(self) -> Status:
        """State of every process and worker."""
        return self._json("GET", "/status", Status, repeatable=True)

    def audit(self, *, limit: int = 50, before: int | None = None) -> AuditPage:
        """Lines of the audit log, newest first; `before` is `next` of the page before."""
        params = {"limit": limit} | ({} if before is None else {"before": before})
        return self._json("GET", "/audit", AuditPage, params=params, repeatable=True)

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Wait until the server is ready for requests.

        Raises:
            SteeringClientError: code `not_ready`; it was not so in time.
        """
        deadline, last = time.monotonic() + timeout_s, "no answer"
        while True:
            try:
                answer = self._http.get("/health/ready", timeout=min(_PROBE_TIMEOUT_S, self._timeout_s))
                if answer.status_code == HTTPStatus.OK:
                    return
                last = f"status {answer.status_code}"
            except httpx.TransportError as error:
                last = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise SteeringClientError(
                    None, "not_ready", f"{self._http.base_url} was not ready within {timeout_s:g} s ({last})."
                )
            time.sleep(_POLL_S)

    def _json(
        self,
        method: str,
        path: str,
        model: type[Answer],
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        repeatable: bool = False,
    ) -> Answer:
        answer = self._send(method, path, params=params, headers=headers, json=body, repeatable=repeatable)
        return _read(answer, model)

    def _add(self, body: Mapping[str, str], signature: bytes | None, dry_run: bool) -> BundleAnswer:
        headers = {} if signature is None else _signed(signature)
        return self._json("POST", "/bundles", BundleAnswer, body, {"dry_run": dry_run}, headers, repeatable=True)

    def _delete(self, path: str, drain: bool, drain_s: float, headers: Mapping[str, str]) -> None:
        params = {"drain": drain, "timeout_s": drain_s}
        timeout_s = self._timeout_s + (drain_s if drain else 0)
        self._send("DELETE", path, params=params, headers=headers, timeout_s=timeout_s)

    def _pages(self, path: str, model: type[Answer]) -> Iterator[Answer]:
        cursor: str | None = None
        while True:
            page = self._json("GET", path, model, params={} if cursor is None else {"cursor": cursor}, repeatable=True)
            yield page
            cursor = getattr(page, "next", None)
            if cursor is None:
                return

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        content: Callable[[], Iterator[bytes]] | None = None,
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> httpx.Response:
        """One call with its repetitions; an answer that refuses becomes an exception."""
        for pause_s in (*_PAUSES_S, None):
            try:
                answer = self._http.request(
                    method,
                    _ROOT + path,
                    params=params,
                    headers=headers,
                    json=json,
                    content=None if content is None else content(),
                    timeout=timeout_s or self._timeout_s,
                )
                return accepted(answer)
            except httpx.RequestError as error:
                # Without a connection nothing was sent, so that every call may be made again.
                is_safe = isinstance(error, httpx.ConnectError) or (repeatable and isinstance(error, _BROKEN))
                if pause_s is None or not is_safe:
                    raise SteeringClientError(
                        None, "unreachable", f"{method} {self._http.base_url} failed: {reason(error)}."
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


_BROKEN = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


def accepted(answer: httpx.Response) -> httpx.Response:
    """An answer that does what was asked.

    Raises:
        SteeringClientError: it refuses, with the server's code.
    """
    if answer.is_success:
        return answer
    try:
        problem = Refusal.model_validate_json(answer.content).error
    except ValidationError:
        raise SteeringClientError(
            answer.status_code,
            "bad_answer",
            f"{answer.request.url} answered {answer.status_code} and gave no reason: {quoted(answer.text, 120)}; "
            "is it an ExpertSteer server?",
        ) from None
    raise SteeringClientError(answer.status_code, str(problem.code), problem.message)


def _signed(signature: bytes) -> dict[str, str]:
    return {"x-steering-signature": base64.b64encode(signature).decode()}


def _read(answer: httpx.Response, model: type[Answer]) -> Answer:
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        raise SteeringClientError(
            answer.status_code,
            "bad_answer",
            f"{answer.request.url} gave an answer that this version does not understand "
            f"({error.error_count()} problems); is it an ExpertSteer server of this version?",
        ) from None


def _chunks(file: BinaryIO, num_bytes: int, on_progress: OnProgress | None) -> Iterator[bytes]:
    """The file from its start; a repetition sends all of it again."""
    file.seek(0)
    sent = 0
    while chunk := file.read(_CHUNK_BYTES):
        if sent + len(chunk) > num_bytes:
            break
        yield chunk
        sent += len(chunk)
        if on_progress is not None:
            on_progress(sent, num_bytes)
    if chunk or sent < num_bytes:
        raise SteeringClientError(None, "bad_argument", "The file changed while it was sent; send it again.")


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe must be refused, not waited for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def checked_url(url: str) -> httpx.URL:
    """The address of a server.

    Raises:
        SteeringClientError: it cannot be one.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SteeringClientError(None, "bad_argument", f"{quoted(url, 200)} is no address: {error}.") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise SteeringClientError(
            None, "bad_argument", f"{quoted(url, 200)} is no address of a server; expected http://HOST:PORT."
        )
    try:
        # As the look-up of the name does, where nobody would catch it.
        address.raw_host.decode("ascii").encode("idna")
    except UnicodeError:
        raise SteeringClientError(
            None,
            "bad_argument",
            f"{quoted(url, 200)} is no address: between its dots, a host has 1 to 63 characters.",
        ) from None
    return address


def checked_key(key: str) -> str:
    """An API key that a header can carry.

    Raises:
        SteeringClientError: it is not.
    """
    if not key or not all("!" <= char <= "~" for char in key):
        raise SteeringClientError(
            None,
            "bad_argument",
            "The key is empty or holds blanks or characters outside of ASCII; check where it is from.",
        )
    return key


def _part(text: str) -> str:
    """One part of a path, whatever the text holds."""
    if text in ("", ".", ".."):
        raise SteeringClientError(None, "bad_argument", f"{quoted(text)} is neither a name nor a digest.")
    return quote(text, safe=":")


def _if_match(generation: int | None) -> dict[str, str]:
    return {} if generation is None else {"if-match": f'"{generation}"'}


def reason(error: httpx.RequestError) -> str:
    """Why no answer came, for a message."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
