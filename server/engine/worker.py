"""Workers that steer: vLLM's own worker classes with a steering model runner and three RPC methods.

Named explicitly as `worker_cls`, because vLLM logs and swallows a plugin that fails to import, whereas a worker class
that cannot be imported ends the start. The methods are called through `collective_rpc`, which runs between two engine
steps, so nothing here races with a batch.
"""

from collections.abc import Mapping
from typing import Any

from server.engine.batch import SteeredBatch
from server.engine.config import require_enabled
from server.engine.layers import SteeredModel
from server.engine.program import Program, checksum
from server.engine.runner import steer_runner
from server.engine.runner_v2 import steer_runner_v2
from steering_kernels import backends


class SteeringWorker:
    """Mixin in front of a vLLM worker class."""

    def init_device(self) -> None:
        """Create the model runner, then give it steering before it loads the model."""
        worker: Any = self
        require_enabled(worker.vllm_config)
        super().init_device()  # type: ignore[misc]
        if worker.use_v2_model_runner:
            steer_runner_v2(worker.model_runner)
        else:
            steer_runner(worker.model_runner)

    @property
    def _batch(self) -> SteeredBatch:
        batch: SteeredBatch = self.model_runner.steering  # type: ignore[attr-defined]
        return batch

    def steering_load(self, bundle: str, spec: Mapping[str, Any], data: bytes) -> str:
        """Make a bundle resident. The bytes travel in the call: workers read no files.

        Args:
            bundle: content digest.
            spec: its program, as `Program.to_wire` gives it.
            data: the program's rows, likewise.

        Returns:
            `checksum` of both as received, for the caller to compare over all ranks.

        Raises:
            RowPoolFullError: the pool cannot hold it.
            ValueError: it cannot run on this rank; see `RowPool.load` and `Program.require_gates_within`.
        """
        program = Program.from_wire(spec, data)
        model: SteeredModel = self.model_runner.steered_model  # type: ignore[attr-defined]
        program.require_gates_within({*model.fused, *model.in_place})
        self._batch.pool.load(bundle, program)
        return checksum(spec, data)

    def steering_unload(self, bundle: str) -> None:
        """Free a bundle's rows. The caller makes sure that no request uses it."""
        self._batch.slots.forget(bundle)
        self._batch.pool.unload(bundle)

    def steering_status(self) -> dict[str, Any]:
        """State of this rank: resident bundles, rows, slots and requests, and how its layers are steered."""
        batch, model = self._batch, self.model_runner.steered_model  # type: ignore[attr-defined]
        rows = batch.pool.rows
        return {
            "rank": self.rank,  # type: ignore[attr-defined]
            "bundles": batch.pool.bundles,
            "rows_used": batch.pool.num_used,
            "rows_total": rows.shape[0],
            "slots_used": batch.num_slots_needed,
            "slots_total": batch.slots.codes.shape[1],
            "requests": len(batch.plans),
            "layers": batch.slots.codes.shape[0],
            "fused_layers": list(model.fused),
            "in_place_layers": list(model.in_place),
            "backend": backends.name(rows.device.type, rows.dtype),
        }
