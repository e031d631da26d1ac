"""Times of one turn, from the result of vLLM's client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.plan import Turn

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A turn that has run. In arrays with an entry for each request, NaN stands for one that failed.

    Attributes:
        turn: which one.
        duration_s: from the first request sent to the last answer.
        ttft_s: [num_prompts], time to the first token.
        tpot_s: [num_prompts], mean time of a further token; NaN also where there is none.
        e2e_s: [num_prompts], time to the last token.
        itl_s: times between tokens, of all requests.
        num_output_tokens: of the requests that did not fail.
        errors: of those that did.
        tokens_steered: by the server's own count; None where it cannot be read.
    """

    turn: Turn
    duration_s: float
    ttft_s: Array
    tpot_s: Array
    e2e_s: Array
    itl_s: Array
    num_output_tokens: int
    errors: tuple[str, ...]
    tokens_steered: int | None = None

    @property
    def num_completed(self) -> int:
        """Requests that did not fail."""
        return len(self.ttft_s) - len(self.errors)


def measured(turn: Turn, result: Mapping[str, Any], output_tokens: int) -> Measured:
    """Read vLLM's result.

    Args:
        turn: that ran.
        result: with every request's times (`--save-detailed`).
        output_tokens: that every request asked for; an answer that broke off counts as failed, though vLLM's client
            takes any answer that began for a good one.
    """
    lengths, messages = result["output_lens"], result["errors"]
    errors = [
        message or (f"the answer ended after {length} of {output_tokens} tokens" if length != output_tokens else "")
        for message, length in zip(messages, lengths, strict=True)
    ]
    has_failed = np.array([bool(error) for error in errors])
    ttft_s = np.where(has_failed, np.nan, np.array(result["ttfts"], float))
    e2e_s = np.where(has_failed, np.nan, np.array(result["latencies"], float))
    further = output_tokens - 1
    tpot_s = (e2e_s - ttft_s) / further if further else np.full_like(ttft_s, np.nan)
    gaps = [gap for gaps, failed in zip(result["itls"], has_failed, strict=True) if not failed for gap in gaps]
    return Measured(
        turn,
        duration_s=float(result["duration"]),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        itl_s=np.array(gaps, float),
        num_output_tokens=int(sum(length for length, error in zip(lengths, errors, strict=True) if not error)),
        errors=tuple(_last_line(error) for error in errors if error),
    )


def _last_line(error: str) -> str:
    """vLLM's client gives a traceback, or the phrase of an HTTP status."""
    lines = error.strip().splitlines()
    return lines[-1] if lines else "no reason given"
