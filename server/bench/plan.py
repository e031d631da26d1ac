"""What `expertsteer bench` runs: arms, rates and rounds, in an order in which drift cancels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

UNSTEERED = "unsteered"
_WARM_UP_PROMPTS = 8


class Turn(NamedTuple):
    """One run of vLLM's client.

    Attributes:
        rate: requests a second, in Poisson arrivals; infinity sends all at once.
        round: number of the round; turns of one rate and round have the same prompts and the same arrivals.
        arm: `unsteered`, or the name of a profile.
    """

    rate: float
    round: int
    arm: str


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        server: address.
        model: served name.
        tokenizer: folder or id; prompts are made with it.
        profiles: arms besides `unsteered`.
        rates: requests a second.
        num_prompts: requests of a turn.
        input_tokens, output_tokens: of each request.
        num_rounds: turns of each arm at each rate.
        seed: of prompts and arrivals.
        salt: keeps this benchmark's prompts apart from those of others in the prefix cache.
    """

    server: str
    model: str
    tokenizer: str
    profiles: tuple[str, ...]
    rates: tuple[float, ...]
    num_prompts: int
    input_tokens: int
    output_tokens: int
    num_rounds: int
    seed: int
    salt: str

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms, `unsteered` first."""
        return (UNSTEERED, *self.profiles)

    @property
    def least_duration_s(self) -> float:
        """Time that the arrivals take, however fast the server is."""
        per_arm = sum(self.num_prompts / rate for rate in self.rates if not math.isinf(rate))
        return per_arm * self.num_rounds * len(self.arms)

    def turns(self) -> Iterator[Turn]:
        """The turns in order: every second round goes through the arms backwards (ABBA)."""
        for rate in self.rates:
            for number in range(self.num_rounds):
                for arm in self.arms if number % 2 == 0 else reversed(self.arms):
                    yield Turn(rate, number, arm)

    def warm_ups(self) -> Iterator[list[str]]:
        """Arguments of short runs that are not counted: the server compiles and fills its caches."""
        for arm in self.arms:
            num_prompts = min(self.num_prompts, _WARM_UP_PROMPTS)
            yield self._arguments(arm, math.inf, num_prompts, self.seed, f"{self.salt}-warm-{self.arms.index(arm)}")

    def arguments(self, turn: Turn) -> list[str]:
        """Arguments of `vllm bench serve` for a turn."""
        rate, number = self.rates.index(turn.rate), turn.round
        salt = f"{self.salt}-{rate}-{number}-{self.arms.index(turn.arm)}"
        seed = self.seed + 1 + rate * self.num_rounds + number
        return self._arguments(turn.arm, turn.rate, self.num_prompts, seed, salt)

    def _arguments(self, arm: str, rate: float, num_prompts: int, seed: int, salt: str) -> list[str]:
        """See `arguments`.

        The salt is another one for every turn: arms share their prompts, and the second one would find them cached.
        """
        name = self.model if arm == UNSTEERED else f"{self.model}@{arm}"
        return [
            *("--backend", "openai", "--base-url", self.server, "--endpoint", "/v1/completions"),
            *("--model", self.model, "--served-model-name", name, "--tokenizer", self.tokenizer),
            *("--dataset-name", "random", "--input-len", str(self.input_tokens)),
            *("--output-len", str(self.output_tokens), "--num-prompts", str(num_prompts)),
            *("--request-rate", f"{rate:g}", "--burstiness", "1", "--seed", str(seed), "--temperature", "0"),
            *("--extra-body", f'{{"cache_salt": "{salt}"}}', "--save-detailed", "--disable-tqdm"),
        ]
