"""The API process's view of the steering engine: load bundles, read state, prove that it works."""

import asyncio
from typing import Any

import numpy as np
import torch

from server.engine.program import Program, Step, checksum
from server.engine.receipts import Receipts
from server.engine.steering import Steering, Term
from steering_kernels import Kind

_SELF_TEST_TIMEOUT_S = 300.0
_SELF_TEST_PROMPT_TOKENS = 8


class SteeringEngineError(RuntimeError):
    """The engine did not do what was asked of it; the message says what was seen where."""


class SteeringEngine:
    """Wraps vLLM's `AsyncLLM` client.

    Attributes:
        receipts: counts of steered tokens as the workers report them.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self.receipts = Receipts()
        self.receipts.attach(engine_client)

    async def load(self, bundle: str, program: Program) -> None:
        """Make a bundle resident on every rank.

        Args:
            bundle: content digest.
            program: what it does.

        Raises:
            SteeringEngineError: a rank has no room, or the ranks disagree about the bytes they received.
        """
        spec, data = program.to_wire()
        try:
            checksums = await self._client.collective_rpc("steering_load", args=(bundle, spec, data))
        except Exception as error:
            raise SteeringEngineError(f"Cannot load {bundle}: {error}") from error
        if any(found != checksum(spec, data) for found in checksums):
            raise SteeringEngineError(f"Ranks disagree about {bundle}: {checksums}")

    async def unload(self, bundle: str) -> None:
        """Free a bundle's rows on every rank; the caller makes sure that no request uses it."""
        await self._client.collective_rpc("steering_unload", args=(bundle,))

    async def status(self) -> list[dict[str, Any]]:
        """State of every rank, see `SteeringWorker.steering_status`."""
        return list(await self._client.collective_rpc("steering_status"))

    async def self_test(self) -> None:
        """Prove, by real requests through scheduler, workers and compiled graphs, that every layer can be steered.

        One request per layer applies a random vector at that layer alone; its log-probabilities must differ from the
        unsteered ones and the workers must report exactly the tokens that were asked for. (vLLM's dummy runs would not
        do: without attention metadata the CPU backend returns uninitialised memory.)

        Raises:
            SteeringEngineError: names the layers without effect or the count that is wrong.
        """
        status = (await self.status())[0]
        vocab_size = self._client.model_config.get_vocab_size()
        prompt = [1 + (7919 * index) % (vocab_size - 1) for index in range(_SELF_TEST_PROMPT_TOKENS)]
        hidden_size = self._client.model_config.get_hidden_size()
        rng = np.random.default_rng(0)
        rows = torch.from_numpy(rng.standard_normal((1, hidden_size)).astype(np.float32) * 8)
        unsteered, _ = await self._probe(prompt, None)
        silent = []
        for layer in range(status["layers"]):
            bundle = f"self-test:{layer}"
            await self.load(bundle, Program(rows, (Step(layer, Kind.ADD, write=0),)))
            steered, tokens = await self._probe(prompt, Steering(bundle, (Term(bundle, 1.0, "all"),)))
            await self.unload(bundle)
            # The last of the two generated tokens is never fed back.
            if tokens != len(prompt) + 1:
                raise SteeringEngineError(
                    f"Self-test at layer {layer}: workers report {tokens} steered tokens, expected {len(prompt) + 1}."
                )
            if steered == unsteered or not all(np.isfinite(steered)):
                silent.append(layer)
        if silent:
            raise SteeringEngineError(f"Self-test: steering has no effect at layers {silent}; refusing to serve.")
        if (await self._probe(prompt, None))[0] != unsteered:
            raise SteeringEngineError("Self-test: an unsteered request after steered ones has other log-probabilities.")

    async def _probe(self, prompt: list[int], steering: Steering | None) -> tuple[list[float], int]:
        """Log-probabilities of the prompt's and two generated tokens, and the number of steered tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=2,
            min_tokens=2,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
            extra_args=steering.to_extra_args() if steering else None,
        )
        name = steering.request_id if steering else "self-test:off"
        with self.receipts.expect(name) as counts:
            async with asyncio.timeout(_SELF_TEST_TIMEOUT_S):
                async for output in self._client.generate({"prompt_token_ids": prompt}, params, f"probe-{name}"):
                    final = output
            entries = [*final.prompt_logprobs[1:], *final.outputs[0].logprobs]
            chosen = [*prompt[1:], *final.outputs[0].token_ids]
            return [entry[token].logprob for entry, token in zip(entries, chosen, strict=True)], sum(
                map(sum, counts.values())
            )
