"""Sizes of a model, told from its configuration without its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from artifacts.jobs.errors import BuildError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model in some dtype."""

    parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    bytes_per_weight: int


def model_shape(name: str, directory: Path, dtype: str) -> ModelShape:
    """Build the model on the meta device, which takes no memory, and count.

    Raises:
        BuildError: the configuration names no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot tell the size of {name}: {' '.join(str(error).split())}") from error
    text = config.get_text_config()
    return ModelShape(
        parameters=sum(each.numel() for each in network.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=int(network.get_output_embeddings().weight.shape[0]),
        bytes_per_weight=getattr(torch, dtype).itemsize,
    )
