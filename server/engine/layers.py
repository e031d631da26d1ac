"""Decoder layers: found by structure, wrapped by subclassing in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.compat import IncompatibleVllmError
from steering_kernels import steer_

_BUFFERS = ("steering_pool", "steering_write_rows", "steering_scales", "steering_slot_ids", "steering_strengths")


class SteeredLayer(nn.Module):
    """Mixin in front of a decoder layer's own class: run the layer, then steer its output.

    Fused vLLM layers return (hidden_states, residual) and the residual stream is their sum, so adding to the first is
    adding to the stream; the others return the stream itself. The buffers are the runner's own tensors: their
    addresses never change, which is what CUDA graphs and compiled code rely on.
    """

    steering_pool: Tensor
    steering_write_rows: Tensor
    steering_scales: Tensor
    steering_slot_ids: Tensor
    steering_strengths: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, with its first tensor [num_tokens, hidden_size] steered in place."""
        output = super().forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        steer_(
            hidden,
            self.steering_pool,
            self.steering_write_rows,
            self.steering_scales,
            self.steering_slot_ids,
            self.steering_strengths,
        )
        return output


def find_decoder_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """Decoder layers of a vLLM model, by structure and not by class names.

    Args:
        model: the loaded model.
        num_layers: number of decoder layers according to its configuration.

    Returns:
        The num_layers entries of the outermost `nn.ModuleList` of that length whose entries all have parameters and
        at least two children (attention or another sequence mixer, and the rest of the block).

    Raises:
        IncompatibleVllmError: no list, or several unrelated lists, qualify.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and _is_layer_list(module)
    ]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise IncompatibleVllmError(
            f"Cannot tell the decoder layers of {type(model).__name__}: expected one list of {num_layers} layers, "
            f"found {found}. This architecture is not supported."
        )
    return list(outermost[0][1])


def _is_layer_list(layers: Iterable[nn.Module]) -> bool:
    return all(len(list(layer.children())) >= 2 and any(True for _ in layer.parameters()) for layer in layers)


def wrap_layers(
    layers: list[nn.Module], pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """Make every layer steer its output. Call once, before compilation and graph capture.

    The class is changed on the instance, so that torch.compile traces an ordinary method and vLLM's compile cache sees
    this file among the traced sources.

    Args:
        layers: decoder layers in order.
        pool: [num_rows, hidden_size].
        write_rows: [num_layers, num_slots, max_ops], int32.
        scales: [num_layers, num_slots, max_ops], fp32.
        slot_ids: [max_num_tokens], int32.
        strengths: [max_num_tokens], fp32.
    """
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for index, layer in enumerate(layers):
        cls = type(layer)
        if cls not in classes:
            classes[cls] = type(f"Steered{cls.__name__}", (SteeredLayer, cls), {})
        layer.__class__ = classes[cls]
        tensors: tuple[torch.Tensor, ...] = (pool, write_rows[index], scales[index], slot_ids, strengths)
        for name, tensor in zip(_BUFFERS, tensors, strict=True):
            layer.register_buffer(name, tensor, persistent=False)
