"""Workers that steer: vLLM's own worker classes with a steering model runner and three RPC methods.

Named explicitly as `worker_cls`, because vLLM logs and swallows a plugin that fails to import, whereas a worker class
that cannot be imported ends the start. The methods are called through `collective_rpc`, which runs between two engine
steps, so nothing here races with a batch.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from server.engine.runner import SteeringRunner, steer_runner
from steering_kernels import backend


class SteeringWorker:
    """Mixin in front of a vLLM worker class."""

    def init_device(self) -> None:
        """Create the model runner, then give it steering before it loads the model."""
        super().init_device()  # type: ignore[misc]
        steer_runner(self.model_runner)  # type: ignore[attr-defined]

    @property
    def _runner(self) -> SteeringRunner:
        return self.model_runner  # type: ignore[attr-defined]

    def steering_load(self, bundle: str, layers: list[int], data: bytes) -> str:
        """Make a bundle resident. The bytes travel in the call: workers read no files.

        Args:
            bundle: content digest.
            layers: target layer of each row, in the order in which rows apply.
            data: fp32 rows, [len(layers), hidden_size], C order, little endian.

        Returns:
            SHA-256 of `data` as received, for the caller to compare over all ranks.

        Raises:
            RowPoolFullError: the pool cannot hold it.
        """
        vectors = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(len(layers), -1).copy())
        writes = {
            layer: vectors[[row for row, owner in enumerate(layers) if owner == layer]] for layer in sorted(set(layers))
        }
        self._runner.row_pool.load(bundle, writes)
        return hashlib.sha256(data).hexdigest()

    def steering_unload(self, bundle: str) -> None:
        """Free a bundle's rows. The caller makes sure that no request uses it."""
        self._runner.slot_table.forget(bundle)
        self._runner.row_pool.unload(bundle)

    def steering_status(self) -> dict[str, Any]:
        """State of this rank: resident bundles, rows, slots and requests."""
        runner = self._runner
        keys = {segment.key for plan in runner.plans.values() for segment in plan.segments}
        return {
            "rank": self.rank,  # type: ignore[attr-defined]
            "bundles": runner.row_pool.bundles,
            "rows_used": runner.row_pool.num_used,
            "rows_total": runner.row_pool.rows.shape[0],
            "slots_used": len(keys),
            "slots_total": runner.slot_table.write_rows.shape[1],
            "requests": len(runner.plans),
            "layers": runner.slot_table.write_rows.shape[0],
            "backend": backend(runner.row_pool.rows.device.type, runner.row_pool.rows.dtype),
        }
