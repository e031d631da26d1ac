"""JSON over HTTP with several requests in flight, bounded in time, with one kind of error."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self, TypeVar

import httpx

from artifacts.errors import quoted
from artifacts.jobs.errors import BuildError

TIMEOUT: Final = httpx.Timeout(300, connect=10)
WORKERS: Final = 16
_BUSY: Final = (429, 502, 503, 504)
_ATTEMPTS: Final = 4
_FIRST_PAUSE_S: Final = 0.5

Item = TypeVar("Item")
Result = TypeVar("Result")
_KEEPALIVE_S = 2.0


class Endpoint:
    """A server that speaks JSON. Use it in a `with` block, or call `close`."""

    def __init__(
        self, url: str, key: str | None = None, workers: int = WORKERS, timeout: httpx.Timeout = TIMEOUT
    ) -> None:
        """Connect lazily.

        Args:
            url: what comes before every path; http or https.
            key: sent as bearer token; never part of a message.
            workers: requests in flight at once.
            timeout: of each request.

        Raises:
            BuildError: the address is none.
        """
        self.url = url.rstrip("/")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # Shorter than the 5 s after which common servers drop an idle connection: no request meets a closing one.
        limits = httpx.Limits(max_connections=workers, keepalive_expiry=_KEEPALIVE_S)
        try:
            parsed = httpx.URL(self.url)
            self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise BuildError(f"{quoted(url)} is no address ({error}); give one like http://host:8000") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            self._client.close()
            raise BuildError(f"{quoted(url)} is no http address; give one like http://host:8000")
        self._workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def get(self, path: str) -> Any:
        """Body of a GET.

        Raises:
            BuildError: as `post`.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: object) -> Any:
        """Body of the answer to a POST.

        Raises:
            BuildError: no connection, no answer in time, another status than 200, or no JSON.
        """
        return self._ask("POST", path, body)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function that makes requests to every item, several at once, in order; the first error is raised."""
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, method: str, path: str, body: object) -> Any:
        address = f"{self.url}{path}"
        response = None
        try:
            for attempt in range(_ATTEMPTS):
                if attempt:
                    time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
                try:
                    response = self._client.request(method, address, json=body)
                except (httpx.RemoteProtocolError, httpx.ReadError):
                    # The connection broke. Every request here may be asked again.
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
                if response.status_code not in _BUSY:
                    break
        except httpx.TimeoutException:
            raise BuildError(
                f"{address} gave no answer within {self._client.timeout.read} s; is it overloaded?"
            ) from None
        except httpx.HTTPError as error:
            raise BuildError(f"{address} cannot be reached ({error}); check the address and that it runs") from None
        assert response is not None
        if response.status_code != 200:
            raise BuildError(f"{address} answered {response.status_code}: {quoted(_reason(response), 300)}")
        try:
            return response.json()
        except ValueError:
            raise BuildError(
                f"{address} answered no JSON: {quoted(response.text, 120)}; is it the right address?"
            ) from None


def _reason(response: httpx.Response) -> str:
    """Message of an OpenAI-style error, or the whole body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text
