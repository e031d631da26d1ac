"""What a request carries into the engine: the resolved steering."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

# Key of `SamplingParams.extra_args`. Clients cannot set it: the API refuses every `steer*` key in `vllm_xargs`.
EXTRA_ARGS_KEY = "steering"

ScopeName = Literal["all", "prompt", "response", "generation"]
# Spans of a text that a profile may leave unsteered. The first two begin and end with tokens that the model writes
# (`server.engine.spans`); the third is the whole answer of a request whose output follows a grammar.
SPAN_NAMES = ("reasoning", "tool_calls")
CONSTRAINED = "structured_output"
END = 2**62


class TokenRange(NamedTuple):
    """Absolute positions [start, stop) of a request's tokens."""

    start: int
    stop: int


def scope_range(scope: ScopeName, num_prompt_tokens: int) -> TokenRange:
    """Positions that a scope steers.

    Phase is a matter of absolute position, so it survives chunked prefill, preemption and speculative tokens: `prompt`
    is position < num_prompt_tokens, `generation` the rest, `response` the generation and the last prompt token (the one
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
        bundle: program key: a digest "sha256:<hex>", or "sha256:<hex>+2,5" for the interventions of some layers only.
        strength: multiplier of the bundle's interventions; never 0 (strength 0 is no term at all).
        scope: which tokens.
        exclude: which spans stay unsteered: names of `SPAN_NAMES`, and CONSTRAINED where the request's output follows a
            grammar.
    """

    bundle: str
    strength: float
    scope: ScopeName
    exclude: tuple[str, ...] = ()

    @property
    def spans(self) -> tuple[str, ...]:
        """The excluded spans that depend on the tokens of the text."""
        return tuple(name for name in SPAN_NAMES if name in self.exclude)

    def positions(self, num_prompt_tokens: int) -> TokenRange:
        """Positions that it steers, before spans are taken out.

        Of a constrained answer nothing is steered, not even the last prompt token, whose output is its first token.
        """
        start, stop = scope_range(self.scope, num_prompt_tokens)
        if CONSTRAINED in self.exclude:
            stop = min(stop, max(0, num_prompt_tokens - 1))
        return TokenRange(start, max(start, stop))


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
        terms = [[term.bundle, term.strength, term.scope, list(term.exclude)] for term in self.terms]
        return {EXTRA_ARGS_KEY: {"id": self.request_id, "terms": terms}}

    def for_answer(self, *, constrained: bool) -> "Steering":
        """The steering of an answer that follows a grammar, or of one that does not."""
        if constrained:
            return self
        terms = (
            replace(term, exclude=tuple(span for span in term.exclude if span != CONSTRAINED)) for term in self.terms
        )
        return replace(self, terms=tuple(terms))

    @staticmethod
    def from_sampling_params(sampling_params: Any) -> "Steering | None":
        """Steering of a vLLM `SamplingParams`; None where there is none (also for pooling requests)."""
        extra_args: Mapping[str, Any] | None = getattr(sampling_params, "extra_args", None)
        if not extra_args or EXTRA_ARGS_KEY not in extra_args:
            return None
        data = extra_args[EXTRA_ARGS_KEY]
        terms = tuple(
            Term(bundle, float(strength), cast(ScopeName, scope), tuple(exclude))
            for bundle, strength, scope, exclude in data["terms"]
        )
        return Steering(data["id"], terms)


def keys_of(sampling_params: Any) -> set[str]:
    """Program keys that a vLLM `SamplingParams` names; cheaper than the whole `Steering`."""
    extra_args: Mapping[str, Any] | None = getattr(sampling_params, "extra_args", None)
    data = extra_args.get(EXTRA_ARGS_KEY) if extra_args else None
    return {term[0] for term in data["terms"]} if data else set()
