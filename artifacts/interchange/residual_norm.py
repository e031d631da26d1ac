"""Median norms of a target's residual stream, measured by running it."""

from collections.abc import Sequence
from pathlib import Path

from artifacts.interchange.vector_import import ResidualNorms
from artifacts.jobs.data import Text, read_rows
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import load_model
from artifacts.jobs.residual import median_norms
from artifacts.jobs.source import FoundModel
from artifacts.jobs.workdir import file_digest

# More tokens of one text say little more about the norm.
_MAX_TOKENS = 512
_BATCH_TOKENS = 8192


def measure_norms(target: FoundModel, texts: Path, layers: Sequence[int], dtype: str, device: str) -> ResidualNorms:
    """Run the target over texts and return the median norm after each of `layers`.

    Args:
        target: the model.
        texts: JSON Lines file of `text` or `messages`.
        layers: 0-based decoder blocks.
        dtype, device: of the run, as in `artifacts.jobs.model.load_model`.

    Raises:
        BuildError: unreadable texts, a model that cannot be loaded, texts of one token each, or a norm of 0, NaN or
            infinity.
    """
    rows = read_rows(texts, Text)
    model = load_model(target.identity.id, target.directory, dtype, device)
    tokens = [model.prompt_ids(row)[:_MAX_TOKENS] for row in rows]
    if max(map(len, tokens)) < 2:
        raise BuildError(f"the texts in {texts} have one token each; the first is left out, so give longer ones")
    medians = median_norms(model, tokens, layers, _BATCH_TOKENS)
    for layer, norm in medians.items():
        if norm == 0:
            raise BuildError(
                f"the median norm after layer {layer} is 0, which is no unit; check the weights of the model"
            )
    return ResidualNorms(medians, f"sha256:{file_digest(texts)}")
