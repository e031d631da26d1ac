"""Token counts on their way back from the workers to the API process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.engine.compat import require_signature

# Travels in EngineCoreOutput.trace_headers, a string mapping that vLLM hands through for tracing and otherwise ignores.
TOKENS_HEADER = "x-expertsteer-tokens"


class Receipts:
    """Latest token counts of the requests that somebody waits for.

    Seam: `AsyncLLM.output_processor.process_outputs(engine_core_outputs, ...)`, wrapped on the instance, sees every
    output before the request's own consumer does. Nothing is stored for requests that nobody registered, so a client
    that goes away leaves nothing behind.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, list[int]]] = {}

    def attach(self, engine_client: Any) -> None:
        """Read the counts off every output that reaches this API process.

        Raises:
            IncompatibleVllmError: the seam looks different.
        """
        processor = engine_client.output_processor
        original = processor.process_outputs
        require_signature(original, ("engine_core_outputs",))

        def process_outputs(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            if self._counts:
                for output in engine_core_outputs:
                    # After a stop string, engine core runs on until the abort reaches it: tokens of no answer.
                    if output.request_id in processor.request_states:
                        self._note(output.request_id, output.trace_headers)
            return original(engine_core_outputs, *args, **kwargs)

        processor.process_outputs = process_outputs

    @contextmanager
    def expect(self, steering_id: str) -> Iterator[dict[str, list[int]]]:
        """Collect the counts of one steering (live).

        Yields:
            Engine request id -> tokens steered so far: of the first term those of the prompt and those of the
            generation, of the second term likewise, and so on.
        """
        counts = self._counts.setdefault(steering_id, {})
        try:
            yield counts
        finally:
            del self._counts[steering_id]

    def _note(self, request_id: str, headers: Any) -> None:
        value = headers.get(TOKENS_HEADER) if headers else None
        if value is not None:
            steering_id, _, tokens = value.rpartition(":")
            if (counts := self._counts.get(steering_id)) is not None:
                counts[request_id] = [int(count) for count in tokens.split(",")]
