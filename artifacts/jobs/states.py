"""Residual-stream states on disk: safetensors shards, read one layer at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from artifacts.jobs.model import CausalModel, PaddedBatch, batches, pad
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import fresh_directory, is_done, mark_done, read_json, write_json, write_tensors

SHARD_ROWS = 512
INPUTS = "inputs.json"


@dataclass(frozen=True)
class StateStore:
    """States of one model on the rows of one file, at the last token of every row.

    The directory holds `shard-00000.safetensors`, ... each with one tensor `layer.{l}` [rows, hidden_size], float32,
    per captured layer, and a marker that is written last.
    """

    directory: Path

    def layer(self, layer: int) -> Tensor:
        """States of one layer, [num_rows, hidden_size], float32."""
        parts = []
        for path in sorted(self.directory.glob("shard-*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                parts.append(shard.get_tensor(f"layer.{layer}"))
        return torch.cat(parts)


def capture_states(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    directory: Path,
    digest: str,
    batch_tokens: int,
    title: str,
    quiet: bool,
) -> bool:
    """Write the states of tokenised prompts; memory holds one shard, whatever their number.

    Finished shards of an interrupted run with the same digest are kept.

    Args:
        model: to read.
        prompts: token ids, one row each, not empty.
        layers: whose output is kept.
        directory: of the store.
        digest: of everything that decides the states.
        batch_tokens: padded tokens of one forward pass.
        title, quiet: of the progress bar.

    Returns:
        Whether anything was computed; False when the store was already complete.
    """
    if is_done(directory, digest):
        return False
    inputs = directory / INPUTS
    if not inputs.is_file() or read_json(inputs) != digest:
        fresh_directory(directory)
        write_json(inputs, digest)
    starts = range(0, len(prompts), SHARD_ROWS)
    for number, start in enumerate(progress(starts, title, quiet)):
        path = directory / f"shard-{number:05d}.safetensors"
        if not path.exists():
            states = last_token_states(model, prompts[start : start + SHARD_ROWS], layers, batch_tokens)
            write_tensors(path, {f"layer.{layer}": rows for layer, rows in states.items()})
    mark_done(directory, digest, rows=len(prompts), layers=list(layers))
    return True


def last_token_states(
    model: CausalModel, prompts: Sequence[Sequence[int]], layers: Sequence[int], batch_tokens: int
) -> dict[int, Tensor]:
    """Output of each layer at the last token of every prompt, [num_rows, hidden_size], float32, on the CPU."""
    states = {layer: torch.empty(len(prompts), model.hidden_size) for layer in layers}
    for indices in batches(prompts, batch_tokens):
        rows = [prompts[index] for index in indices]
        batch = pad(model, rows, left=False)
        last = batch.mask.sum(1) - 1
        place = torch.arange(len(rows), device=model.device)
        for layer, output in _read_layers(model, batch, layers, (place, last)).items():
            states[layer][indices] = output.float().cpu()
    return states


def median_norms(
    model: CausalModel, rows: Sequence[Sequence[int]], layers: Sequence[int], batch_tokens: int
) -> dict[int, float]:
    """Median norm of the residual stream after each layer, over all tokens but the first of a row.

    The first token is left out because many models park an attention sink with a huge norm there.
    """
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for indices in batches(rows, batch_tokens):
        batch = pad(model, [rows[index] for index in indices], left=False)
        counted = batch.mask.bool()
        counted[:, 0] = False
        for layer, output in _read_layers(model, batch, layers, counted).items():
            norms[layer].append(output.float().norm(dim=-1).cpu())
    return {layer: float(torch.cat(parts).median()) for layer, parts in norms.items()}


@torch.inference_mode()
def _read_layers(
    model: CausalModel, batch: PaddedBatch, layers: Sequence[int], where: Tensor | tuple[Tensor, Tensor]
) -> dict[int, Tensor]:
    """`output[where]` of each layer, taken as the layer finishes so that no full output outlives it."""
    outputs: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple) else output)[where]

        return read

    handles = [model.layers[layer].register_forward_hook(reader(layer)) for layer in layers]
    try:
        # The backbone only: logits over the vocabulary are not needed here.
        model.network.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
