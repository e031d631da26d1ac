"""Quantised copies of the lab's target, written by hand in the formats of their makers, beside what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP_SIZE, WEIGHTS_PER_WORD = 32, 8
# Where AWQ's kernels want the output channels of an int32 word, lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INT8_MAX, _FP8_MAX = 127.0, torch.finfo(torch.float8_e4m3fn).max


class Linear(NamedTuple):
    """A quantised linear layer: tensors of the checkpoint by their last name, and the weight that they stand for."""

    tensors: dict[str, Tensor]
    weight: Tensor


class Format(NamedTuple):
    """How a linear layer is quantised.

    Attributes:
        quantise: for a weight [outputs, inputs], fp32.
        activation: what the kernels make of the layer's input, [..., inputs]; None where they take it as it is.
    """

    quantise: Callable[[Tensor], Linear]
    activation: Callable[[Tensor], Tensor] | None = None


class Method(NamedTuple):
    """Formats by a part of the layers' names, and `quantization_config` of the model's config.json."""

    formats: dict[str, Format]
    config: dict[str, Any]


class Quantised(NamedTuple):
    """A quantised copy: its folder, and by name of each quantised layer what its linear map is.

    Attributes:
        folder: the checkpoint.
        layers: weight [outputs, inputs], fp32, and `Format.activation`.
    """

    folder: Path
    layers: dict[str, tuple[Tensor, Callable[[Tensor], Tensor] | None]]


def _packed(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(WEIGHTS_PER_WORD))) -> Tensor:
    """Whole numbers 0..15, eight to an int32 along `dim`, the first of `order` in the lowest bits."""
    parts = values.movedim(dim, -1).unflatten(-1, (-1, WEIGHTS_PER_WORD)).long()
    words = sum(parts[..., index] << (4 * place) for place, index in enumerate(order))
    assert isinstance(words, Tensor)
    # The highest bit of a word is the sign of its int32.
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, dim).contiguous()


def _grouped(weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 and the weights that they stand for, both [outputs, inputs]; scales, zeros: [outputs, groups]."""
    groups, scale, zero = weight.unflatten(1, (-1, GROUP_SIZE)), scales.float()[:, :, None], zeros[:, :, None]
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return codes.flatten(1), ((codes - zero) * scale).flatten(1)


def _gptq(weight: Tensor) -> Linear:
    scales = (weight.unflatten(1, (-1, GROUP_SIZE)).abs().amax(2) / 7).half()
    zeros = torch.full(scales.shape, 8.0)
    codes, meant = _grouped(weight, scales, zeros)
    tensors = {
        "qweight": _packed(codes.T, 0),
        # The format stores one less than the zero point.
        "qzeros": _packed(zeros.T - 1, 1),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP_SIZE,
    }
    return Linear(tensors, meant)


def _awq(weight: Tensor) -> Linear:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes, meant = _grouped(weight, scales, zeros)
    tensors = {
        "qweight": _packed(codes.T, 1, _AWQ_ORDER),
        "qzeros": _packed(zeros.T, 1, _AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return Linear(tensors, meant)


def _int8(weight: Tensor) -> Linear:
    scales = weight.abs().amax(1, keepdim=True) / _INT8_MAX
    codes = (weight / scales).round()
    return Linear({"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales)


def _int8_rows(x: Tensor) -> Tensor:
    scales = x.abs().amax(-1, keepdim=True) / _INT8_MAX
    return (x / scales).round() * scales


def _fp8(weight: Tensor) -> Linear:
    scales = weight.abs().amax(1, keepdim=True) / _FP8_MAX
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return Linear({"weight": codes, "weight_scale": scales}, codes.float() * scales)


def _fp8_rows(x: Tensor) -> Tensor:
    scales = x.abs().amax(-1, keepdim=True) / _FP8_MAX
    return (x / scales).to(torch.float8_e4m3fn).float() * scales


def _group(target: str, number: str) -> dict[str, Any]:
    """Of compressed-tensors: 8 bits, a scale for each output channel of a weight and for each token at run time."""
    eight_bits = {"num_bits": 8, "type": number, "symmetric": True}
    return {
        "targets": [target],
        "format": f"{number}-quantized",
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }


_FOUR_BITS = {"bits": 4, "group_size": GROUP_SIZE}
METHODS = {
    "gptq": Method({"": Format(_gptq)}, {"quant_method": "gptq", "sym": True, "desc_act": False, **_FOUR_BITS}),
    "awq": Method({"": Format(_awq)}, {"quant_method": "awq", "version": "gemm", "zero_point": True, **_FOUR_BITS}),
    "fp8-int8": Method(
        {"self_attn": Format(_fp8, _fp8_rows), "mlp": Format(_int8, _int8_rows)},
        {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "mixed-precision",
            "ignore": ["lm_head"],
            "config_groups": {"fp8": _group("re:.*self_attn.*", "float"), "int8": _group("re:.*mlp.*", "int")},
        },
    ),
}


@pytest.fixture(scope="session")
def quantise(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantised]:
    """Write a copy of the target, all its linear layers but the (tied) output quantised by a method of `METHODS`."""

    def write(name: str) -> Quantised:
        method, folder = METHODS[name], tmp_path_factory.mktemp(name)
        for path in target.iterdir():
            shutil.copy(path, folder)
        tensors, layers = {}, {}
        for key, tensor in load_file(target / "model.safetensors").items():
            if not key.endswith("_proj.weight"):
                tensors[key] = tensor
                continue
            layer = key.removesuffix(".weight")
            (form,) = (form for part, form in method.formats.items() if part in layer)
            linear = form.quantise(tensor.float())
            layers[layer] = (linear.weight, form.activation)
            tensors |= {f"{layer}.{last}": part for last, part in linear.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method.config}))
        return Quantised(folder, layers)

    return write
