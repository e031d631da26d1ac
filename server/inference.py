"""Client of what a server answers, for the commands that ask it: models, one completion, counters."""

import difflib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError

from artifacts.errors import quoted
from server.client import SteeringClientError, accepted, checked_key, checked_url, reason
from server.schema import Receipt

_MAX_LISTED = 20


class ModelCard(BaseModel):
    """An entry of `GET /v1/models`, as far as it is used here."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _ModelList(BaseModel):
    data: list[ModelCard]


class Served(NamedTuple):
    """A model and the profiles that the key may use with it.

    Attributes:
        model: what a request puts into `model`.
        root: where the server has it from: a folder or an id.
        max_model_len: tokens of prompt and answer together; None where the server does not say.
        profiles: their names.
    """

    model: str
    root: str | None
    max_model_len: int | None
    profiles: tuple[str, ...]


class InferenceClient:
    """Asks a server for small things. For one thread at a time."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        """Prepare calls; nothing is sent.

        Args:
            url: of the server, without a path of the API.
            key: API key; None for a server without keys.
            timeout_s: how long an answer may take.

        Raises:
            SteeringClientError: the address or the key cannot be one.
        """
        self._http = httpx.Client(base_url=checked_url(url), headers=key_header(key), timeout=timeout_s)

    def __enter__(self) -> "InferenceClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def served(self, model: str | None = None) -> Served:
        """A model that the server has, and its profiles.

        Args:
            model: its name; None for the first one.

        Raises:
            SteeringClientError: there is no such model, or no answer.
        """
        answer = self._send("GET", "/v1/models")
        try:
            cards = _ModelList.model_validate_json(answer.content).data
        except ValidationError:
            raise _not_understood(answer) from None
        return choose(cards, model)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of `POST /v1/completions`.

        Raises:
            SteeringClientError: refused, or no answer.
        """
        answer = self._send("POST", "/v1/completions", json=body)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _not_understood(answer)
        return found

    def counters(self, name: str) -> dict[tuple[tuple[str, str], ...], float] | None:
        """Samples of one series of `/metrics` by their sorted labels; None where the series cannot be read."""
        try:
            answer = self._http.get("/metrics")
        except httpx.RequestError:
            return None
        if answer.status_code != HTTPStatus.OK:
            return None
        try:
            return {
                tuple(sorted(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(answer.text)
                for sample in family.samples
                if sample.name == name
            } or None
        except ValueError:
            return None

    def _send(self, method: str, path: str, json: Any = None) -> httpx.Response:
        try:
            return accepted(self._http.request(method, path, json=json))
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from error


def key_header(key: str | None) -> dict[str, str]:
    """Headers that carry a key.

    Raises:
        SteeringClientError: it cannot be one.
    """
    return {} if key is None else {"authorization": f"Bearer {checked_key(key)}"}


def unreachable(url: httpx.URL, error: httpx.RequestError) -> SteeringClientError:
    """The error of a call that got no answer."""
    return SteeringClientError(None, "unreachable", f"{url} gives no answer: {reason(error)}.")


def choose(cards: Sequence[ModelCard], model: str | None) -> Served:
    """One model of a list, with its profiles.

    Args:
        cards: of `GET /v1/models`.
        model: its name; None for the first.

    Raises:
        SteeringClientError: it is not in the list, or is one with a profile in its name.
    """
    models = [card for card in cards if not any(_profile_of(card, base) for base in cards)]
    chosen = next((card for card in models if model in (None, card.id)), None)
    if chosen is not None:
        names = (_profile_of(card, chosen) for card in cards)
        return Served(chosen.id, chosen.root, chosen.max_model_len, tuple(name for name in names if name))
    if model is not None and any(model.startswith(f"{card.id}@") for card in models):
        raise SteeringClientError(
            None, "bad_argument", f"Model {quoted(model)} has a profile in its name; name the profile by itself."
        )
    served = ", ".join(card.id for card in models[:_MAX_LISTED]) or "none"
    raise SteeringClientError(None, "bad_argument", f"The server has no model {quoted(model)}; served: {served}.")


def check_profile(served: Served, name: str) -> None:
    """Check that a profile, maybe with `@sha256:...`, is among those that the server lists.

    Raises:
        SteeringClientError: it is not.
    """
    base = name.partition("@")[0]
    if base in served.profiles:
        return
    near = difflib.get_close_matches(base, served.profiles, n=3, cutoff=0.4)
    listed = ", ".join(served.profiles[:_MAX_LISTED]) + (", ..." if len(served.profiles) > _MAX_LISTED else "")
    hint = f"near names: {', '.join(near)}" if near else f"served: {listed or 'none'}"
    raise SteeringClientError(
        None,
        "steering_profile_not_found",
        f"The server lists no profile {quoted(base)} for this key; {hint}.",
    )


def receipts(answer: Mapping[str, Any]) -> tuple[Receipt, ...]:
    """The receipts in an answer; empty for an unsteered one.

    Raises:
        SteeringClientError: they are not what this version understands.
    """
    found = answer.get("steering")
    try:
        return tuple(Receipt.model_validate(each) for each in (found if isinstance(found, list) else [found]) if each)
    except ValidationError:
        raise SteeringClientError(
            None, "bad_answer", f"The receipt {quoted(found)} is not of this version; is it an ExpertSteer server?"
        ) from None


def _profile_of(card: ModelCard, base: ModelCard) -> str | None:
    """Name of the profile that a card stands for, if it is one of `base`."""
    start = f"{base.id}@"
    return card.id.removeprefix(start) if card.parent == base.id and card.id.startswith(start) else None


def _not_understood(answer: httpx.Response) -> SteeringClientError:
    return SteeringClientError(
        answer.status_code,
        "bad_answer",
        f"{answer.request.url} gave an answer that this version does not understand: {quoted(answer.text, 120)}.",
    )
