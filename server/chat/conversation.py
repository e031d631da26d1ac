"""A conversation and what it is steered with."""

from dataclasses import dataclass, field
from typing import Any

from artifacts.manifest import Scope

# A digest as far as people compare it.
_DIGEST_CHARS = len("sha256:") + 8


@dataclass
class Conversation:
    """What has been said, and how the next answer is asked for.

    Attributes:
        model: served model.
        profile: that steers, maybe with `@sha256:...`; None for none.
        strength: in place of the profile's default; None for that.
        scope: in place of the profile's default; None for that.
        is_side_by_side: whether every question is also answered unsteered.
        system: system prompt.
        temperature: of sampling; 0 takes the most probable token, so that answers differ by their steering alone.
        max_tokens: of an answer; None for what the server allows.
        messages: question, answer, question, ...
    """

    model: str
    profile: str | None = None
    strength: float | None = None
    scope: Scope | None = None
    is_side_by_side: bool = False
    system: str | None = None
    temperature: float = 0.0
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What steers, in a few characters."""
        if self.profile is None:
            return "unsteered"
        strength = "" if self.strength is None else f" {self.strength:g}"
        scope = "" if self.scope is None else f" {self.scope.value}"
        name, versioned, digest = self.profile.partition("@")
        return f"{name}{versioned}{digest[:_DIGEST_CHARS]}{strength}{scope}"

    def choose(self, profile: str | None) -> None:
        """Steer with another profile, at its defaults; None for none."""
        self.profile, self.strength, self.scope = profile, None, None
        self.is_side_by_side = self.is_side_by_side and profile is not None

    def body(self, question: str, *, is_steered: bool = True) -> dict[str, Any]:
        """Request for the answer to a question."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *self.messages, {"role": "user", "content": question}],
            "temperature": self.temperature,
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if is_steered and self.profile is not None:
            ref = {"name": self.profile, "strength": self.strength, "scope": self.scope}
            body["steering_profile"] = {key: value for key, value in ref.items() if value is not None}
        return body

    def add(self, question: str, answer: str) -> None:
        """Note what was said."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def take_back(self) -> str | None:
        """Forget the last answer and its question; returns the question, None where there is none."""
        if not self.messages:
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question
