"""The proof, by real requests, that every layer can be steered."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from server.engine.program import Program, Step
from server.engine.steering import Steering, Term
from steering_kernels import Kind

if TYPE_CHECKING:
    from server.engine.client import SteeringEngine

# Keys of the bundles that the test loads begin with this; no digest does.
PREFIX = "self-test:"
_TIMEOUT_S = 300.0
_PROMPT_TOKENS = 8
_PROGRESS_S = 5.0
# An effect must exceed by this factor what two equal unsteered requests differ by. On an idle engine they do not; among
# other requests, for example the self-tests of other API processes, matrix products round differently.
_MARGIN = 4.0


class Probe(NamedTuple):
    """What one request showed: log-probabilities of the prompt and two generated tokens, and steered tokens."""

    logprobs: tuple[float, ...]
    num_steered: int

    def distance(self, other: "Probe") -> float:
        """Largest difference of a log-probability; infinite or NaN where one is."""
        return float(np.abs(np.subtract(self.logprobs, other.logprobs)).max())


class SelfTest:
    """One run over every layer and every replica.

    One request per layer and replica applies a random vector at that layer alone; its log-probabilities must differ
    from the unsteered ones and the workers must report exactly the tokens that were asked for. (vLLM's dummy runs would
    not do: without attention metadata the CPU backend returns uninitialised memory.)

    Args:
        engine: what is tested.
        engine_client: vLLM's `AsyncLLM`.
        num_replicas: data-parallel replicas; each gets every request.
        num_layers: decoder blocks of the served model.
    """

    def __init__(self, engine: "SteeringEngine", engine_client: Any, num_replicas: int, num_layers: int) -> None:
        self._engine = engine
        self._client = engine_client
        self._num_replicas = num_replicas
        self._num_layers = num_layers
        # Several API processes of one engine may test at the same time.
        self._name = f"{PREFIX}{uuid.uuid4().hex}"
        vocab_size = engine_client.model_config.get_vocab_size()
        self._prompt = [1 + (7919 * index) % (vocab_size - 1) for index in range(_PROMPT_TOKENS)]

    async def run(self) -> list[str]:
        """Test every layer.

        Returns:
            What is wrong, one sentence each; empty when nothing is.
        """
        hidden_size = self._client.model_config.get_hidden_size()
        rows = torch.from_numpy(np.random.default_rng(0).standard_normal((1, hidden_size)).astype(np.float32) * 8)
        before = await self._probe_all(None)
        steered, problems = [], []
        shown_s = time.monotonic()
        for layer in range(self._num_layers):
            probes = await self._steer(f"{self._name}:{layer}", Program(rows, (Step(layer, Kind.ADD, write=0),)))
            steered.append(probes)
            problems += self._miscounts(layer, probes)
            if time.monotonic() - shown_s > _PROGRESS_S:
                self._report(layer + 1)
                shown_s = time.monotonic()
        after = await self._probe_all(None)
        for replica in range(self._num_replicas):
            of_replica = [probes[replica] for probes in steered]
            problems += _effects(before[replica], after[replica], of_replica, self._place(replica))
        return problems

    def _report(self, num_tested: int) -> None:
        from vllm.logger import init_logger

        init_logger("vllm.expertsteer").info("Steering self-test: %d of %d layers.", num_tested, self._num_layers)

    def _place(self, replica: int) -> str:
        return f" of replica {replica}" if self._num_replicas > 1 else ""

    def _miscounts(self, layer: int, probes: Sequence[Probe]) -> list[str]:
        # The last of the two generated tokens is never fed back.
        expected = len(self._prompt) + 1
        return [
            f"at layer {layer}{self._place(replica)} workers report {probe.num_steered} steered tokens, "
            f"expected {expected}"
            for replica, probe in enumerate(probes)
            if probe.num_steered != expected
        ]

    async def _steer(self, key: str, program: Program) -> list[Probe]:
        await self._engine.load(key, program)
        try:
            return await self._probe_all(key)
        finally:
            await self._engine.unload(key)

    async def _probe_all(self, key: str | None) -> list[Probe]:
        probes = (self._probe(key, replica) for replica in range(self._num_replicas))
        return list(await asyncio.gather(*probes))

    async def _probe(self, key: str | None, replica: int) -> Probe:
        from vllm import SamplingParams

        name = f"{key or self._name}@{replica}"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=2,
            min_tokens=2,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
            extra_args=Steering(name, (Term(key, 1.0, "all"),)).to_extra_args() if key else None,
        )
        target = {"data_parallel_rank": replica} if self._num_replicas > 1 else {}
        request_id = f"probe-{name}-{uuid.uuid4().hex}"
        with self._engine.receipts.expect(name) as counts:
            async with asyncio.timeout(_TIMEOUT_S):
                async for output in self._client.generate(
                    {"prompt_token_ids": self._prompt}, params, request_id, **target
                ):
                    final = output
            entries = [*final.prompt_logprobs[1:], *final.outputs[0].logprobs]
            chosen = [*self._prompt[1:], *final.outputs[0].token_ids]
            logprobs = tuple(entry[token].logprob for entry, token in zip(entries, chosen, strict=True))
            return Probe(logprobs, sum(map(sum, counts.values())))


def _effects(before: Probe, after: Probe, steered: Sequence[Probe], place: str) -> list[str]:
    """What the probes of one replica say is wrong with it."""
    noise = before.distance(after)
    effects = [probe.distance(before) for probe in steered]
    if noise > 0 and not noise * _MARGIN < max(effects, default=0.0):
        return [f"an unsteered request after steered ones{place} has other log-probabilities"]
    silent = [layer for layer, effect in enumerate(effects) if not (np.isfinite(effect) and effect > noise * _MARGIN)]
    return [f"steering has no effect at layers {silent}{place}"] if silent else []
