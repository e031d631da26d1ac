"""What a request carries into the engine: the resolved steering."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

# Key of `SamplingParams.extra_args`. Clients cannot set it: the API refuses every `steer*` key in `vllm_xargs`.
EXTRA_ARGS_KEY = "steering"

ScopeName = Literal["all", "prompt", "response", "generation"]
END = 2**62


class TokenRange(NamedTuple):
    """Absolute positions [start, stop) of a request's tokens."""

    start: int
    stop: int


def scope_range(scope: ScopeName, num_prompt_tokens: int) -> TokenRange:
    """Positions that a scope steers.

    Phase is a matter of absolute position, so it survives chunked prefill and preemption: `prompt` is
    position < num_prompt_tokens, `generation` the rest, `response` the generation and the last prompt token (the one
    whose output is the first answer token).
    """
    match scope:
        case "all":
            return TokenRange(0, END)
        case "prompt":
            return TokenRange(0, num_prompt_tokens)
        case "response":
            return TokenRange(max(0, num_prompt_tokens - 1), END)
        case "generation":
            return TokenRange(num_prompt_tokens, END)


@dataclass(frozen=True, slots=True)
class Term:
    """One bundle applied with one strength to one scope.

    Attributes:
        bundle: content digest, "sha256:<hex>".
        strength: multiplier of the bundle's write rows; never 0 (strength 0 is no term at all).
        scope: which tokens.
    """

    bundle: str
    strength: float
    scope: ScopeName


@dataclass(frozen=True, slots=True)
class Steering:
    """Immutable steering of one request, in the order in which its terms are applied.

    Attributes:
        request_id: id under which the workers report the number of steered tokens. Shared by the n choices and the
            prompts of one HTTP request.
        terms: at least one.
    """

    request_id: str
    terms: tuple[Term, ...]

    def to_extra_args(self) -> dict[str, Any]:
        """Plain data that survives msgpack on its way to engine core and workers."""
        return {
            EXTRA_ARGS_KEY: {
                "id": self.request_id,
                "terms": [[term.bundle, term.strength, term.scope] for term in self.terms],
            }
        }

    @staticmethod
    def from_sampling_params(sampling_params: Any) -> "Steering | None":
        """Steering of a vLLM `SamplingParams`; None where there is none (also for pooling requests)."""
        extra_args: Mapping[str, Any] | None = getattr(sampling_params, "extra_args", None)
        if not extra_args or EXTRA_ARGS_KEY not in extra_args:
            return None
        data = extra_args[EXTRA_ARGS_KEY]
        terms = tuple(
            Term(bundle, float(strength), cast(ScopeName, scope)) for bundle, strength, scope in data["terms"]
        )
        return Steering(data["id"], terms)
