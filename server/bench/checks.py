"""That the steered arms are steered, and the other one is not: receipts before and after, counters in between."""

import time
from dataclasses import dataclass

from artifacts.errors import quoted
from server.bench.client import BenchError
from server.bench.plan import UNSTEERED, Plan
from server.inference import InferenceClient, receipts
from server.schema import Receipt

_REQUESTS, _TOKENS = "steering_requests_total", "steering_tokens_total"
_PROBE_TOKENS = 4
# A server of several processes sums their counters about once a second.
_COUNT_TIMEOUT_S, _PAUSE_S = 10.0, 0.25


@dataclass(frozen=True)
class Counted:
    """Counters of a profile: requests that ended well, and tokens steered."""

    num_requests: float
    num_tokens: float


def probe(client: InferenceClient, plan: Plan) -> dict[str, Receipt]:
    """Ask every arm once.

    Returns:
        The receipt of each profile.

    Raises:
        BenchError: a profile's answer is not steered, or the other arm's is.
        SteeringClientError: an arm is refused, or there is no answer.
    """
    found = {}
    for arm in plan.arms:
        name = plan.model if arm == UNSTEERED else f"{plan.model}@{arm}"
        answer = client.complete(model=name, prompt="Hello", max_tokens=_PROBE_TOKENS, temperature=0)
        given = receipts(answer)
        if arm == UNSTEERED:
            if given:
                raise BenchError(f"Model {quoted(name)} answers with a receipt, so there is nothing to compare with.")
            continue
        if len(given) != 1 or not given[0].strength or not given[0].tokens_steered:
            what = f"strength {given[0].strength:g}, {given[0].tokens_steered} tokens" if given else "no receipt"
            raise BenchError(f"Profile {quoted(arm)} did not steer a probe ({what}); measuring it would show nothing.")
        found[arm] = given[0]
    return found


def check_unchanged(before: dict[str, Receipt], after: dict[str, Receipt]) -> None:
    """Check that every profile still means the same.

    Raises:
        BenchError: one was changed in the meantime.
    """
    for arm, was in before.items():
        now = after[arm]
        if (was.bundle, was.strength, was.scope) != (now.bundle, now.strength, now.scope):
            raise BenchError(
                f"Profile {quoted(arm)} was changed while it was measured ({was.bundle[:19]} at {was.strength:g}, now "
                f"{now.bundle[:19]} at {now.strength:g}); measure again."
            )


def count(client: InferenceClient, arm: str) -> Counted | None:
    """Counters of a profile now; None where they cannot be read, or the profile has none of its own."""
    name = arm.partition("@")[0]
    requests, tokens = client.counters(_REQUESTS), client.counters(_TOKENS)
    if requests is None or tokens is None or not any(("profile", name) in labels for labels in requests):
        return None
    return Counted(
        requests.get((("outcome", "ok"), ("profile", name)), 0.0),
        sum(value for labels, value in tokens.items() if ("profile", name) in labels),
    )


def steered_tokens(client: InferenceClient, arm: str, before: Counted, num_requests: int) -> int:
    """Tokens that a profile steered since `before`.

    Args:
        client: of the server.
        arm: the profile.
        before: its counters before the turn.
        num_requests: that ended well in the turn; the server must have counted as many, or more where others ask too.

    Raises:
        BenchError: it has not, so the turn may have been unsteered.
    """
    deadline_s = time.monotonic() + _COUNT_TIMEOUT_S
    while True:
        now = count(client, arm)
        num_counted = 0.0 if now is None else now.num_requests - before.num_requests
        num_tokens = 0.0 if now is None else now.num_tokens - before.num_tokens
        if num_counted >= num_requests and (num_tokens > 0 or not num_requests):
            return int(num_tokens)
        if time.monotonic() > deadline_s:
            raise BenchError(
                f"The server counted {num_counted:g} requests and {num_tokens:g} tokens steered by {quoted(arm)} where "
                f"{num_requests} requests were answered; if /metrics is that of one server among several, use "
                "--no-counters."
            )
        time.sleep(_PAUSE_S)
