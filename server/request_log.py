"""One structured log record for each steered request."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from server.metrics.counts import sum_choices, total
from server.profiles import Resolved

# Below "vllm", whose handlers vLLM configures.
logger = logging.getLogger("vllm.expertsteer.requests")


def enable(is_enabled: bool) -> None:
    """Choose whether requests are logged.

    Args:
        is_enabled: whether; if not, a request costs one comparison.
    """
    logger.setLevel(logging.INFO if is_enabled else logging.WARNING)


def log_request(
    resolved: Resolved,
    outcome: str,
    counts: Mapping[str, Sequence[int]],
    request_id: str | None,
    duration_s: float,
) -> None:
    """Log a steered request that has ended.

    The message is `key=value` pairs; the record has the same values as attributes, for handlers that write JSON.

    Args:
        resolved: what it was steered with.
        outcome: ok, refused, aborted or failed.
        counts: tokens steered, see `SteeringMetrics.admitted`.
        request_id: that the client or a proxy gave it, if any.
        duration_s: from admission to the end of the answer.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    terms = resolved.terms
    tokens = total(sum_choices(counts, sum(1 for term in terms if term.strength)))
    fields: dict[str, Any] = {
        "request_id": request_id,
        "steering_id": resolved.steering.request_id if resolved.steering else None,
        "profile": ",".join(term.profile.name for term in terms),
        "bundle": ",".join(term.profile.settings.bundle for term in terms),
        "strength": ",".join(f"{term.strength:g}" for term in terms),
        "scope": ",".join(term.scope.value for term in terms),
        "prompt_tokens": tokens.prompt,
        "generation_tokens": tokens.generation,
        "outcome": outcome,
        "duration_s": round(duration_s, 6),
    }
    text = " ".join(f"{key}={_value(value)}" for key, value in fields.items())
    logger.info("Steered request %s", text, extra=fields)


def _value(value: object) -> str:
    """Value of a pair: quoted where a reader could not tell where it ends, nothing unprintable."""
    if value is None:
        return "-"
    text = str(value)
    if text and text.isprintable() and not any(character in text for character in ' "=\\'):
        return text
    escaped = "".join(_escaped(character) for character in text)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
