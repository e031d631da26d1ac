"""States of one model on every text of the study, captured once."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from artifacts.lab.dataset import mapping_texts
from artifacts.lab.model import LabModel
from artifacts.lab.study.regime import texts, wordings


@dataclass(frozen=True)
class Reading:
    """Last-token states, float32.

    Attributes:
        labelled: by wording, [num_texts, num_layers, hidden_size], rows as in `regime.texts`.
        mapping: [num_mapping, num_layers, hidden_size], the unlabelled texts.
    """

    labelled: dict[str, Tensor]
    mapping: Tensor

    @classmethod
    def of(cls, model: LabModel) -> "Reading":
        """Read all texts with `model`."""
        return cls(
            {wording: model.last_states(texts(wording)) for wording in wordings()}, model.last_states(mapping_texts())
        )

    @property
    def num_layers(self) -> int:
        return self.mapping.shape[1]


def untrained(directory: Path, seed: int) -> LabModel:
    """The architecture and tokenizer of a lab model with fresh random weights."""
    trained = LabModel.load(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(trained.model)(trained.model.config)
    return LabModel(model.float().eval(), trained.tokenizer)
