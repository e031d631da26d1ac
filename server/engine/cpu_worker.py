"""Worker class for machines without a GPU. A module of its own: importing vLLM's CPU worker changes the process."""

from vllm.v1.worker.cpu_worker import CPUWorker

from server.engine.worker import SteeringWorker


class SteeringCPUWorker(SteeringWorker, CPUWorker):
    """vLLM's CPU worker, steering."""
