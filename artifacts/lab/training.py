"""Train a lab model from scratch on one CPU core. The same recipe on the same machine gives the same bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from artifacts.lab.model import LabModel
from artifacts.lab.recipe import MAX_POSITIONS, Recipe
from artifacts.lab.tokenizer import PAD_ID, train_tokenizer

_IGNORED_LABEL: Final = -100
_AVERAGED_STEPS: Final = 50  # the loss that is shown and kept is a mean over this many last steps


@dataclass(frozen=True)
class Trained:
    """A model in bf16, its tokenizer, the cross-entropy of every step in nats, and how many tokens it learned from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    losses: tuple[float, ...]
    num_tokens: int

    @property
    def final_loss(self) -> float:
        return _recent(self.losses)


class Batch(NamedTuple):
    """One document per row, cut or padded: both [batch_size, sequence_length] int64, padding labelled -100."""

    tokens: Tensor
    labels: Tensor


class Optimizers(NamedTuple):
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""

    muon: torch.optim.Muon
    adamw: torch.optim.AdamW

    def step(self, recipe: Recipe, step: int) -> None:
        """Update the parameters in place at the learning rates of `step` and drop the gradients."""
        # Muon normalises its own updates; only AdamW's gradients can throw the model off.
        nn.utils.clip_grad_norm_(self.adamw.param_groups[0]["params"], recipe.gradient_clip)
        peaks = (recipe.muon_learning_rate, recipe.adamw_learning_rate)
        for optimizer, peak in zip(self, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * recipe.learning_rate_factor(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(recipe: Recipe, *, start: LabModel | None = None, progress: bool = True) -> Trained:
    """Train `recipe` with a progress bar on stderr if `progress`, from scratch or from the weights of `start`.

    Everything random is drawn from the recipe's seed, and torch runs on one thread, because a sum split over threads
    depends on their number. torch's global random state and thread count are restored.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = _tokenizer(recipe) if start is None else start.tokenizer
        model = recipe.untrained_model(len(tokenizer)).train()
        if start is not None:
            model.load_state_dict(start.model.state_dict())
        losses, num_tokens = [], 0
        for loss, learned in _steps(model, tokenizer, recipe, progress=progress):
            losses.append(loss)
            num_tokens += learned
    return Trained(model.to(torch.bfloat16).eval(), tokenizer, tuple(losses), num_tokens)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    documents = Random(f"{recipe.name} tokenizer {recipe.seed}")
    texts = (recipe.mixture.document(documents) for _ in range(recipe.tokenizer_documents))
    return train_tokenizer(texts, recipe.vocab_size, MAX_POSITIONS)


def _steps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, progress: bool
) -> Iterator[tuple[float, int]]:
    """Run every training step in place; yields its loss in nats and the number of tokens it learned from."""
    optimizers = _optimizers(model, recipe)
    documents = Random(f"{recipe.name} documents {recipe.seed}")
    losses: list[float] = []
    with tqdm(range(recipe.steps), desc=f"training {recipe.name}", unit="step", disable=not progress) as bar:
        for step in bar:
            batch = _batch(recipe, tokenizer, documents)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch.tokens, labels=batch.labels).loss
            loss.backward()
            optimizers.step(recipe, step)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{_recent(losses):.3f}", refresh=False)
            yield losses[-1], int((batch.labels[:, 1:] != _IGNORED_LABEL).sum())


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> Optimizers:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_block_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_block_matrix else others).append(parameter)
    return Optimizers(
        muon=torch.optim.Muon(
            matrices,
            lr=recipe.muon_learning_rate,
            momentum=recipe.muon_momentum,
            weight_decay=recipe.muon_weight_decay,
        ),
        adamw=torch.optim.AdamW(others, lr=recipe.adamw_learning_rate, betas=recipe.adamw_betas, weight_decay=0.0),
    )


def _batch(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, documents: Random) -> Batch:
    texts = [recipe.mixture.document(documents) for _ in range(recipe.batch_size)]
    tokens = torch.full((recipe.batch_size, recipe.sequence_length), PAD_ID)
    for row, ids in enumerate(tokenizer(texts)["input_ids"]):
        kept = ids[: recipe.sequence_length]
        tokens[row, : len(kept)] = torch.tensor(kept)
    return Batch(tokens, tokens.masked_fill(tokens == PAD_ID, _IGNORED_LABEL))


def _recent(losses: tuple[float, ...] | list[float]) -> float:
    return fmean(losses[-_AVERAGED_STEPS:])


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: faster on models this small where cores are shared, and the same sums everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
