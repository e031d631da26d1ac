"""A worker whose hook does nothing at two layers, for the self-test to find."""

from typing import Any

from server.engine.cpu_worker import SteeringCPUWorker

SILENT_LAYERS = (1, 4)


class BrokenWorker(SteeringCPUWorker):
    """The steering worker, with some layers turned back into vLLM's own."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        layers = self.model_runner.get_model().model.layers
        for index in SILENT_LAYERS:
            _, layers[index].__class__ = type(layers[index]).__bases__
