"""Workers that steer: vLLM's own worker classes with a steering model runner and RPC methods.

Named explicitly as `worker_cls`, because vLLM logs and swallows a plugin that fails to import, whereas a worker class
that cannot be imported ends the start. The methods are called through `collective_rpc`, which runs between two engine
steps, so nothing here races with a batch.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from server.engine.batch import SteeredBatch
from server.engine.config import require_enabled
from server.engine.layers import SteeredModel
from server.engine.program import Program, checksum
from server.engine.row_pool import RowPoolFullError
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
        self._started_s = time.monotonic()
        if worker.use_v2_model_runner:
            steer_runner_v2(worker.model_runner)
        else:
            steer_runner(worker.model_runner)

    @property
    def _batch(self) -> SteeredBatch:
        batch: SteeredBatch = self.model_runner.steering  # type: ignore[attr-defined]
        return batch

    def steering_load(self, bundle: str, spec: Mapping[str, Any], data: bytes) -> dict[str, Any]:
        """Make a bundle resident. The bytes travel in the call: workers read no files.

        It does not raise for what one rank may find and another not, because the caller must hear of all of them.

        Args:
            bundle: program key.
            spec: its program, as `Program.to_wire` gives it.
            data: the program's rows, likewise.

        Returns:
            {"rank", "checksum"}, with the `checksum` of the program that is resident now, which is another than the
            one sent if the key was taken; or {"rank", "error", "code"}, and nothing was changed.
        """
        rank = self.rank  # type: ignore[attr-defined]
        try:
            return {"rank": rank, "checksum": self._load(bundle, spec, data)}
        except RowPoolFullError as error:
            return {"rank": rank, "error": str(error), "code": "no_room"}
        except (KeyError, TypeError, ValueError) as error:
            return {"rank": rank, "error": str(error) or repr(error), "code": "rejected"}
        except RuntimeError as error:
            # The device refused, for example for want of memory.
            return {"rank": rank, "error": str(error), "code": "failed"}

    def _load(self, bundle: str, spec: Mapping[str, Any], data: bytes) -> str:
        batch = self._batch
        if bundle not in batch.pool:
            program = Program.from_wire(spec, data)
            model: SteeredModel = self.model_runner.steered_model  # type: ignore[attr-defined]
            program.require_sound(batch.slots.codes.shape[0])
            program.require_gates_within({*model.fused, *model.in_place})
            batch.pool.load(bundle, program, checksum(spec, data))
        return batch.pool[bundle].checksum

    def steering_unload(self, bundle: str) -> str:
        """Free a bundle's rows: "unloaded", or "absent" where it was not resident.

        Engine core lets no call through while a request uses the bundle.
        """
        if bundle not in self._batch.pool:
            return "absent"
        self._batch.slots.forget(bundle)
        self._batch.pool.unload(bundle)
        return "unloaded"

    def steering_status(self) -> dict[str, Any]:
        """State of this rank: resident bundles, rows, slots and requests, and how its layers are steered."""
        batch, model = self._batch, self.model_runner.steered_model  # type: ignore[attr-defined]
        rows = batch.pool.rows
        return {
            **self.steering_counters(),
            "pid": os.getpid(),
            "uptime_s": time.monotonic() - self._started_s,
            "bundles": batch.pool.bundles,
            "requests": len(batch.plans),
            "layers": batch.slots.codes.shape[0],
            "fused_layers": list(model.fused),
            "in_place_layers": list(model.in_place),
            "backend": backends.name(rows.device.type, rows.dtype),
        }

    def steering_counters(self) -> dict[str, Any]:
        """The figures of this rank that a scrape of metrics asks for."""
        batch = self._batch
        return {
            "rank": self.rank,  # type: ignore[attr-defined]
            "num_bundles": batch.pool.num_bundles,
            "rows_used": batch.pool.num_used,
            "rows_total": batch.pool.rows.shape[0],
            "slots_used": batch.num_slots_needed,
            "slots_total": batch.slots.codes.shape[1],
            "host_time": batch.times.to_wire(),
        }

    def steering_ended(self, steering_ids: list[str]) -> dict[str, Any] | None:
        """Hand over, and forget, the final counts of the requests of these ids that have ended.

        Returns:
            `EndedRequests.take`; None on a rank that does not see which drafts are accepted, because the tokens are
            sampled on another one.
        """
        ended = self._batch.ended.take(steering_ids)
        parallel = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        is_output_rank = self.rank == parallel.world_size - parallel.tensor_parallel_size  # type: ignore[attr-defined]
        return ended if is_output_rank else None
