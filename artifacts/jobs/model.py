"""A causal language model of Transformers with its decoder layers found by structure and open to steering."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from artifacts.jobs.data import Question, Text
from artifacts.jobs.device import device_of
from artifacts.jobs.encoding import RowEncoder
from artifacts.jobs.errors import BuildError

GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class CausalModel:
    """A loaded model in evaluation mode.

    Attributes:
        name: for messages.
        network: `PreTrainedModel` for causal language modelling.
        tokenizer: `PreTrainedTokenizerBase`.
        layers: decoder blocks, in order; an intervention at layer l acts on the output of block l.
        hidden_size: width of the residual stream.
        device: of the weights.
    """

    name: str
    network: Any
    tokenizer: Any
    layers: nn.ModuleList
    hidden_size: int
    device: torch.device

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def pad_id(self) -> int:
        """Fills padded places; they are masked, so any valid id does."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: the model's own and the tokenizer's."""
        own = self.network.generation_config.eos_token_id
        ids = set(own if isinstance(own, list) else [own]) | {self.tokenizer.eos_token_id}
        return sorted(token for token in ids if token is not None)

    @property
    def encoder(self) -> RowEncoder:
        """Turns rows into the model's own tokens."""
        return RowEncoder(self.name, self.tokenizer, _context_length(self.network.config))

    def prompt_ids(self, row: Text) -> list[int]:
        """Tokens of a whole row: chats up to the generation prompt or the end of their response, text with its first
        token.

        Raises:
            BuildError: as `RowEncoder.encode`.
        """
        return self.encoder.encode(row).ids

    def answered_ids(self, row: Question) -> list[int]:
        """Tokens of a prompt with its answer.

        Raises:
            BuildError: as `RowEncoder.encode`, the answer counted in.
        """
        return self.encoder.encode_answered(row)

    def answer_ids(self, row: Question) -> list[int]:
        return self.encoder.encode_answer(row)

    @contextmanager
    def steered(self, vectors: Mapping[int, Tensor]) -> Iterator[None]:
        """Add `vectors[layer]` [hidden_size] to the output of those layers, for every token, inside the block."""
        dtype = self.network.dtype
        handles = [
            self.layers[layer].register_forward_hook(_adder(vector.to(self.device, dtype)))
            for layer, vector in vectors.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PaddedBatch(NamedTuple):
    """Token ids and attention mask, both [num_rows, longest], int64, on the model's device."""

    ids: Tensor
    mask: Tensor


def pad(model: CausalModel, rows: Sequence[Sequence[int]], left: bool) -> PaddedBatch:
    """Stack rows of token ids; `left` puts the padding in front, as generation needs."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), model.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return PaddedBatch(ids.to(model.device), mask.to(model.device))


def batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of rows of similar length, so that each batch holds at most `batch_tokens` padded tokens (or one row)."""
    result: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        # Rows come shortest first, so the one added last sets the padded width.
        if result and (len(result[-1]) + 1) * len(rows[index]) <= batch_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def load_model(name: str, directory: Path, dtype: str, device: str, random_seed: int | None = None) -> CausalModel:
    """Load a model and its tokenizer from a directory.

    Args:
        name: for messages.
        directory: of Transformers files.
        dtype: name of the torch dtype of the weights.
        device: "auto", "cpu" or "cuda".
        random_seed: take the architecture only and draw new weights with this seed.

    Raises:
        BuildError: it cannot be loaded or its decoder layers cannot be told.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    place = device_of(device)
    try:
        tokenizer = _load_tokenizer(directory)
        if random_seed is None:
            network = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(random_seed)
                network = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(directory), dtype=getattr(torch, dtype)
                )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot load {name} as a causal language model: {' '.join(str(error).split())}") from error
    network = network.to(place).eval().requires_grad_(False)
    text = network.config.get_text_config()
    return CausalModel(name, network, tokenizer, find_layers(network, text.num_hidden_layers), text.hidden_size, place)


def load_encoder(name: str, directory: Path) -> RowEncoder:
    """What turns rows into a model's tokens, without its weights.

    Raises:
        BuildError: configuration or tokenizer cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
        return RowEncoder(name, _load_tokenizer(directory), _context_length(config))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot load the tokenizer of {name}: {' '.join(str(error).split())}") from error


def _context_length(config: Any) -> int | None:
    """Most tokens of a row; None where the configuration of a model names no bound."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _load_tokenizer(directory: Path) -> Any:
    """The tokenizer as tokenizer.json describes it when no special class is named, else as Transformers chooses.

    For some architectures AutoTokenizer swaps a generic class for the architecture's own, which brings its own
    splitting rule (Qwen2: every digit alone) and silently gives other tokens than the model was trained with.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = directory / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    generic = named in GENERIC_TOKENIZERS and (directory / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(directory)


def find_layers(network: nn.Module, num_layers: int) -> nn.ModuleList:
    """The decoder layers: the one ModuleList of length `num_layers`, whatever its name.

    Lists inside another such list (as many experts as layers) do not count. Where several fit (a vision tower of equal
    depth), the one under `get_decoder()` counts.

    Raises:
        BuildError: none or several remain.
    """
    found = _lists(network, num_layers)
    decoder = getattr(network, "get_decoder", lambda: None)()
    if len(found) > 1 and isinstance(decoder, nn.Module):
        found = _lists(decoder, num_layers)
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise BuildError(
            f"{type(network).__name__} has {len(found)} module lists of its {num_layers} layers ({names}); "
            "exactly one is needed"
        )
    return next(iter(found.values()))


def _lists(network: nn.Module, num_layers: int) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    # Outer modules come before the inner ones.
    for name, module in network.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inner:
            found[name] = module
    return found


def _adder(vector: Tensor) -> Any:
    def add(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    return add
