"""The residual stream after each decoder block, read with forward hooks that keep only the wanted tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, PaddedBatch, batches, pad

NOT_FINITE_REMEDY: Final = "give dtype bfloat16 or float32, whose range float16 lacks, or check the weights"


def read_states(
    model: CausalModel, rows: Sequence[Sequence[int]], spans: Sequence[range], layers: Sequence[int]
) -> Tensor:
    """States of one batch of rows, in one forward pass.

    Semantics: states[l, r] = mean over t in spans[r] of the output of block layers[l] at token t of rows[r]

    A block's output is what the next block reads: the final norm, which Transformers includes in the last of its
    `hidden_states`, is not applied.

    Args:
        model: to read.
        rows: token ids, none empty.
        spans: places in each row, none empty.
        layers: decoder blocks, 0-based.

    Returns:
        [num_layers, num_rows, hidden_size] on the CPU. Spans of one token keep the dtype of the model and its very
        bits; longer ones are averaged in float32.
    """
    # Padding goes to the end, where no token of a causal model sees it, so positions need no correction.
    batch = pad(model, rows, left=False)
    width = batch.ids.shape[1]
    flat = [row * width + place for row, span in enumerate(spans) for place in span]
    places = torch.tensor(flat, device=model.device)
    lengths = None if len(flat) == len(rows) else torch.tensor([len(span) for span in spans], device=model.device)

    def select(output: Tensor) -> Tensor:
        found = output.flatten(0, 1).index_select(0, places)
        return found if lengths is None else torch.segment_reduce(found.float(), "mean", lengths=lengths)

    # One copy to the host for all layers: each copy waits for the device.
    return torch.stack(_run(model, batch, layers, select)).cpu()


def median_norms(
    model: CausalModel, rows: Sequence[Sequence[int]], layers: Sequence[int], batch_tokens: int
) -> dict[int, float]:
    """Median norm of the residual stream after each layer, over all tokens but the first of a row.

    The first token is left out because many models park an attention sink with a huge norm there.

    Raises:
        BuildError: a state is not finite.
    """
    norms: list[Tensor] = []
    for indices in batches(rows, batch_tokens):
        batch = pad(model, [rows[index] for index in indices], left=False)
        counted = batch.mask.bool()
        counted[:, 0] = False
        norms.append(torch.stack(_run(model, batch, layers, partial(_norms, where=counted))).cpu())
    medians = torch.cat(norms, dim=1).median(dim=1).values.tolist()
    found = dict(zip(layers, medians, strict=True))
    for layer, norm in found.items():
        if not norm < float("inf"):
            raise BuildError(f"the median norm of {model.name} after layer {layer} is {norm}; {NOT_FINITE_REMEDY}")
    return found


def _norms(output: Tensor, where: Tensor) -> Tensor:
    return output[where].float().norm(dim=-1)


@torch.inference_mode()
def _run(
    model: CausalModel, batch: PaddedBatch, layers: Sequence[int], keep: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`keep(output)` of each layer, taken as the layer finishes so that no full output outlives it."""
    kept: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept[layer] = keep(output[0] if isinstance(output, tuple) else output)

        return read

    handles = [model.layers[layer].register_forward_hook(reader(layer)) for layer in layers]
    try:
        # The backbone only: logits over the vocabulary are not needed here.
        model.network.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[layer] for layer in layers]
