"""Worker class for GPUs."""

from vllm.v1.worker.gpu_worker import Worker

from server.engine.worker import SteeringWorker


class SteeringGPUWorker(SteeringWorker, Worker):
    """vLLM's GPU worker, steering."""
