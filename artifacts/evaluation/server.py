"""A running server as the subject of an evaluation, asked over its real API."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from artifacts.errors import quoted
from artifacts.evaluation.endpoint import Endpoint
from artifacts.evaluation.subject import Condition, Likelihood
from artifacts.jobs.data import Text
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import MAX_NEUTRAL_TOKENS

# Strengths travel as JSON numbers and come back through fp32 or fp64.
_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class ServedProfile:
    """A profile that the server offers: digest of its bundle, bound of the absolute strength, default scope."""

    name: str
    description: str
    bundle: str
    maximum: float
    scope: str


class ServerSubject:
    """A model behind a steering server; a condition's name is a profile.

    Every steered answer has to carry the receipt of exactly what was asked, and an unsteered one none.
    """

    def __init__(self, endpoint: Endpoint, model: str | None = None) -> None:
        """Ask the server what it serves.

        Args:
            endpoint: of the server; its address ends before /v1.
            model: name of the served model; None takes the first.

        Raises:
            BuildError: the server cannot be reached, serves no such model or is no steering server.
        """
        self._endpoint = endpoint
        self.model = _served_model(endpoint, model)
        self.profiles = _served_profiles(endpoint)
        self._tokens: dict[str, list[int]] = {}

    def about(self) -> dict[str, str]:
        """What the server says about itself."""
        version = self._endpoint.get("/version")
        return {"server": self._endpoint.url, "model": self.model, "vllm": str(_key(version, "version"))}

    def generate(self, prompts: Sequence[Text], steering: Condition, max_new_tokens: int) -> list[str]:
        """Greedy answers: chats through the chat route, plain text through completions."""
        fields = {"temperature": 0, "max_tokens": max_new_tokens, **self._steering_fields(steering)}

        def ask(row: Text) -> str:
            if row.messages:
                answer = self._post("/v1/chat/completions", {"messages": _chat(row), **fields}, steering)
                return str(_key(_choice(answer), "message", "content") or "").strip()
            prompt = self._tokenize({"prompt": row.text})
            return str(
                _key(_choice(self._post("/v1/completions", {"prompt": prompt, **fields}, steering)), "text")
            ).strip()

        return self._endpoint.map(ask, prompts)

    def log_likelihoods(
        self, prompts: Sequence[Text], continuations: Sequence[str], steering: Condition
    ) -> list[Likelihood]:
        """Likelihood of each continuation, from the log-probabilities of a prompt that ends in it.

        Raises:
            BuildError: the profile does not steer all tokens: to the server the continuation is part of the prompt, so
                other scopes would steer other tokens than in a generated answer.
        """
        scope = self.profiles[steering.name].scope if steering.name is not None else "all"
        if scope != "all":
            raise BuildError(
                f"profile {quoted(steering.name)} has scope {scope}, and the server gives likelihoods of steered "
                "answers for scope `all` only; ask questions with `answer` or `pattern`"
            )

        def ask(asked: tuple[Text, str]) -> Likelihood:
            row, text = asked
            prompt = self._prompt(row)
            answer = self._tokenize({"prompt": text, "add_special_tokens": False})
            if not answer:
                raise BuildError(f"{row.where}: no token of {self.model} is in the answer; give another")
            return self._likelihood(prompt, answer, steering, bool(row.messages))

        return self._endpoint.map(ask, list(zip(prompts, continuations, strict=True)))

    def text_log_likelihoods(self, texts: Sequence[Text], steering: Condition) -> list[Likelihood]:
        """Likelihood of each text after its first token, all tokens steered whatever the profile's scope."""

        def ask(row: Text) -> Likelihood:
            ids = self._prompt(row)[:MAX_NEUTRAL_TOKENS]
            if len(ids) < 2:
                raise BuildError(f"{row.where}: the text has {len(ids)} token; perplexity needs two, so take it out")
            return self._likelihood(ids[:1], ids[1:], steering, stop=False)

        return self._endpoint.map(ask, texts)

    def _likelihood(self, prompt: list[int], answer: list[int], steering: Condition, stop: bool) -> Likelihood:
        ids = [*prompt, *answer]
        # The one token that is generated tells whether greedy decoding would stop here.
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choice = _choice(self._post("/v1/completions", {**body, **self._steering_fields(steering, "all")}, steering))
        given = _key(choice, "prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(ids):
            raise BuildError("the server gave no log-probability for every token of the prompt; is it vLLM 0.32?")
        entries = [_key(place, str(token)) for place, token in zip(given[len(prompt) :], answer, strict=True)]
        greedy = all(_key(each, "rank") == 1 for each in entries)
        return Likelihood(
            total=sum(float(_key(each, "logprob")) for each in entries),
            num_tokens=len(answer),
            greedy=greedy and (not stop or _key(choice, "finish_reason") == "stop"),
        )

    def _steering_fields(self, steering: Condition, scope: str | None = None) -> dict[str, Any]:
        if steering.name is None:
            return {}
        profile = self.profiles.get(steering.name)
        if profile is None:
            raise BuildError(
                f"the server has no profile {quoted(steering.name)}; it has {quoted(sorted(self.profiles))}"
            )
        if abs(steering.strength) > profile.maximum * (1 + _TOLERANCE):
            raise BuildError(
                f"profile {profile.name} takes strengths up to {profile.maximum:g}, and {steering.strength:g} is asked"
            )
        chosen = {"name": steering.name, "strength": steering.strength}
        return {"steering_profile": chosen if scope is None else {**chosen, "scope": scope}}

    def _post(self, path: str, body: dict[str, Any], steering: Condition) -> Any:
        answer = self._endpoint.post(path, {"model": self.model, **body})
        expected = None if steering.name is None else self.profiles[steering.name]
        asked = body.get("steering_profile", {}).get("scope")
        check_receipt(answer, expected, steering.strength, asked)
        return answer

    def _prompt(self, row: Text) -> list[int]:
        """Tokens of a row: a chat up to its generation prompt or the end of its response, or plain text."""
        if row.messages:
            ends = {"add_generation_prompt": not row.has_response, "continue_final_message": row.has_response}
            return self._tokenize({"messages": _chat(row), **ends})
        return self._tokenize({"prompt": row.text + (row.response or "")})

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        """Tokens as the server makes them; each text is asked for once."""
        key = json.dumps(body)
        if key not in self._tokens:
            tokens = _list(self._endpoint.post("/tokenize", {"model": self.model, **body}), "tokens")
            if not all(isinstance(token, int) for token in tokens):
                raise BuildError(f"the server's tokens are {quoted(tokens)}, not numbers; is it vLLM 0.32?")
            self._tokens[key] = tokens
        return self._tokens[key]


def check_receipt(answer: Any, profile: ServedProfile | None, strength: float, scope: str | None = None) -> None:
    """Hold the receipt of an answer against what was asked.

    Args:
        answer: of the server.
        profile: None for no steering.
        strength: that was asked for.
        scope: that was asked for; None for the profile's own.

    Raises:
        BuildError: they differ, so the answer is worth nothing.
    """
    receipt = answer.get("steering") if isinstance(answer, dict) else None
    if profile is None:
        if receipt is not None:
            raise BuildError(f"an unsteered answer carries the receipt {quoted(receipt)}; the server cannot be trusted")
        return
    if not isinstance(receipt, dict):
        raise BuildError(
            f"an answer steered by {profile.name} carries no receipt; is there a proxy in between that drops fields?"
        )
    for key, wanted in (("profile", profile.name), ("bundle", profile.bundle)):
        if receipt.get(key) != wanted:
            raise BuildError(f"the receipt says {key} {quoted(receipt.get(key))} and {quoted(wanted)} was asked for")
    ran = receipt.get("strength")
    if not isinstance(ran, int | float) or not math.isclose(ran, strength, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        raise BuildError(f"the receipt of {profile.name} says strength {quoted(ran)} and {strength:g} was asked for")
    scope = scope or profile.scope
    if receipt.get("scope") != scope:
        raise BuildError(f"the receipt of {profile.name} says scope {quoted(receipt.get('scope'))}, asked was {scope}")
    # The first generated token comes from the prompt's last one, which `generation` leaves alone.
    generated = answer.get("usage", {}).get("completion_tokens")
    nothing_to_steer = scope == "generation" and isinstance(generated, int) and generated <= 1
    if strength != 0 and not nothing_to_steer and not receipt.get("tokens_steered"):
        raise BuildError(f"the receipt of {profile.name} counts no steered token; nothing proves that it was steered")


def _served_model(endpoint: Endpoint, model: str | None) -> str:
    cards = _list(endpoint.get("/v1/models"), "data")
    names = [str(_key(card, "id")) for card in cards if card.get("parent") is None]
    if not names or (model is not None and model not in names):
        raise BuildError(f"{endpoint.url} serves {quoted(names)} and not {quoted(model)}; choose one with --model")
    return model or names[0]


def _served_profiles(endpoint: Endpoint) -> Mapping[str, ServedProfile]:
    found = {}
    for each in _list(endpoint.get("/v1/steering/profiles"), "profiles"):
        name, description, bundle, scope = (str(_key(each, key)) for key in ("name", "description", "bundle", "scope"))
        found[name] = ServedProfile(name, description, bundle, float(_key(each, "maximum_strength")), scope)
    return found


def _chat(row: Text) -> list[dict[str, str]]:
    return [each.model_dump() for each in row.messages]


def _choice(answer: Any) -> Any:
    choices = _key(answer, "choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise BuildError(f"the server answered with choices {quoted(choices)}, one was expected")
    return choices[0]


def _key(value: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise BuildError(f"the server's answer has no {quoted(key)}: {quoted(value)}; is the address right?")
        value = value[key]
    return value


def _list(value: Any, key: str) -> list[Any]:
    found = _key(value, key)
    if not isinstance(found, list):
        raise BuildError(f"the server answered {quoted(found)} where a list of {key} was expected; is it vLLM 0.32?")
    return found
