"""Decoder layers: found by structure, wrapped by subclassing in place."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from server.engine.batch import SteeredBatch
from server.engine.compat import IncompatibleVllmError
from server.engine.fusion import adds_residual, forward_of, norms_after, reduces_itself


class SteeredModel(NamedTuple):
    """How a model's layers are steered: by the norm that follows, or by an operator of their own."""

    fused: tuple[int, ...]
    in_place: tuple[int, ...]


class _Steered(nn.Module):
    """What both wrappers hold: the runner's own tensors, whose addresses never change, which is what CUDA graphs and
    compiled code rely on. They fit by construction, so the operators are called without `steering_kernels`' checks,
    which cost more than an idle call."""

    steering_pool: Tensor
    steering_codes: Tensor
    steering_params: Tensor
    steering_slot_ids: Tensor
    steering_strengths: Tensor
    steering_gates: Tensor


class SteeredLayer(_Steered):
    """Mixin in front of a decoder layer's own class: run the layer, then steer its output in place.

    Fused vLLM layers return (hidden_states, residual) and the residual stream is their sum; the others return the
    stream itself, a few of them (PhiMoE) beside a `residual` that the next layer does not read.
    """

    steering_adds_residual: bool | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, with its first tensor [..., num_tokens, hidden_size] steered in place."""
        output = super().forward(*args, **kwargs)
        hidden, residual = output, None
        if isinstance(output, tuple):
            hidden = output[0]
            if len(output) > 1 and isinstance(output[1], Tensor) and self.steering_adds_residual is not False:
                if self.steering_adds_residual is None or output[1].shape != hidden.shape:
                    raise IncompatibleVllmError(
                        f"{type(self).__name__[len('Steered') :]} returns two tensors and its source does not say "
                        "whether the residual stream is their sum. This architecture is not supported."
                    )
                residual = output[1]
        # Models on vLLM's Transformers backend have a batch dimension of 1; several streams (AltUp) would be steered by
        # the wrong tokens' slots. A view, never a copy: it is written.
        if hidden.dim() != 2 and hidden.shape[:-2].numel() != 1:
            raise IncompatibleVllmError(
                f"{type(self).__name__[len('Steered') :]} returns {hidden.dim()} dimensions {tuple(hidden.shape)}, "
                "expected [num_tokens, hidden_size]. This architecture is not supported."
            )
        torch.ops.expertsteer.steer_(
            hidden.view(-1, hidden.shape[-1]),
            self.steering_pool,
            self.steering_codes,
            self.steering_params,
            self.steering_slot_ids,
            self.steering_strengths,
            self.steering_gates,
            None if residual is None else residual.view(-1, residual.shape[-1]),
        )
        return output


class SteeredNorm(_Steered):
    """Mixin in front of the class of an RMSNorm that adds the residual: steer the sum before it is normalised."""

    steering_weight_offset: float

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """What vLLM's norm returns: [num_tokens, hidden_size], with a residual also the new residual."""
        if residual is None:
            return super().forward(x)
        norm: Any = self
        torch.ops.expertsteer.steer_add_rms_norm_(
            x,
            residual,
            norm.weight.data if getattr(norm, "has_weight", True) else None,
            norm.variance_epsilon,
            self.steering_weight_offset,
            self.steering_pool,
            self.steering_codes,
            self.steering_params,
            self.steering_slot_ids,
            self.steering_strengths,
            self.steering_gates,
        )
        return x, residual


def find_decoder_layers(model: nn.Module, num_layers: int) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Decoder layers of a vLLM model, by structure and not by class names.

    Args:
        model: the loaded model.
        num_layers: number of decoder layers according to its configuration.

    Returns:
        The module that owns the outermost `nn.ModuleList` of num_layers entries whose entries all have parameters and
        at least two children (attention or another sequence mixer, and the rest of the block), and its entries by
        number. Of a pipeline's stage only the entries that are there.

    Raises:
        IncompatibleVllmError: no list, or several unrelated lists, qualify.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and _is_layer_list(module)
    ]
    # A list whose entries stand in an earlier list as well (Gemma 4) is another name for it.
    distinct: dict[tuple[int, ...], tuple[str, nn.ModuleList]] = {}
    for name, module in lists:
        distinct.setdefault(tuple(map(id, module)), (name, module))
    outermost = [
        (name, module)
        for name, module in distinct.values()
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise IncompatibleVllmError(
            f"Cannot tell the decoder layers of {type(model).__name__}: expected one list of {num_layers} layers, "
            f"found {found}. This architecture is not supported."
        )
    name, layers = outermost[0]
    present = {index: layer for index, layer in enumerate(layers) if not _is_elsewhere(layer)}
    return model.get_submodule(name.rpartition(".")[0]), present


def _is_layer_list(layers: Iterable[nn.Module]) -> bool:
    present = [layer for layer in layers if not _is_elsewhere(layer)]
    return bool(present) and all(
        len(list(layer.children())) >= 2 and any(True for _ in layer.parameters()) for layer in present
    )


def _is_elsewhere(layer: nn.Module) -> bool:
    """Whether another stage of the pipeline holds this layer."""
    return type(layer).__name__ == "PPMissingLayer"


def steer_model(
    model: nn.Module, num_layers: int, batch: SteeredBatch, *, fuse: bool, is_sharded: bool = False
) -> SteeredModel:
    """Make every layer of a model steer its output. Call once, before compilation and graph capture.

    The class is changed on the instance, so that torch.compile traces an ordinary method and vLLM's compile cache sees
    this file among the traced sources.

    Args:
        model: the loaded model.
        num_layers: number of its decoder layers, those of other pipeline stages included.
        batch: storage on the device.
        fuse: whether to let a known RMSNorm that follows a layer do the layer's steering.
        is_sharded: whether several ranks hold parts of each layer.

    Raises:
        IncompatibleVllmError: the layers cannot be found, or their output is not the residual stream.
    """
    owner, layers = find_decoder_layers(model, num_layers)
    if is_sharded and any(reduces_itself(forward_of(module)) for module in (owner, *layers.values())):
        # DeepSeek V3.2, MiniMax M3: a layer returns this rank's part of a sum that the next norm makes.
        raise IncompatibleVllmError(
            f"The layers of {type(model).__name__} leave their all-reduce to the norm that follows, so their output is "
            "not the residual stream; serve it without --tensor-parallel-size."
        )
    norms = norms_after(owner, layers, num_layers) if fuse else {}
    for index, layer in layers.items():
        if index in norms:
            module = norms[index].module
            _become(module, SteeredNorm, "steering_weight_offset", norms[index].weight_offset)
        else:
            module = layer
            _become(module, SteeredLayer, "steering_adds_residual", adds_residual(forward_of(layer)))
        for name, tensor in _buffers(batch, index).items():
            module.register_buffer(name, tensor, persistent=False)
    in_place = tuple(index for index in layers if index not in norms)
    return SteeredModel(tuple(sorted(norms)), in_place)


def _become(module: nn.Module, mixin: type[_Steered], name: str, value: object) -> None:
    """Put a mixin in front of a module's class, and set what it needs to know about this module."""
    cls = type(module)
    if (mixin, cls) not in _classes:
        _classes[mixin, cls] = type(f"Steered{cls.__name__}", (mixin, cls), {})
    module.__class__ = _classes[mixin, cls]
    setattr(module, name, value)


# One class for all layers of a kind, as torch.compile expects of equal layers.
_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _buffers(batch: SteeredBatch, layer: int) -> Mapping[str, torch.Tensor]:
    return {
        "steering_pool": batch.pool.rows,
        "steering_codes": batch.slots.codes[layer],
        "steering_params": batch.slots.params[layer],
        "steering_slot_ids": batch.tokens.slot_ids,
        "steering_strengths": batch.tokens.strengths,
        "steering_gates": batch.gates,
    }
