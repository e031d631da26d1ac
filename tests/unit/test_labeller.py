"""The expert as labeller: a planted concept goes over to the target, content does not, and bad labels are refused."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from artifacts.vectors.labeller import Labelling, label_texts, labelled_direction, unchecked_labels
from artifacts.vectors.refusal import NoSignalError

LAYERS = (3, 7)
SUBJECTS, CONTENT, EXPERT_WIDTH, TARGET_WIDTH = 60, 12, 40, 24
# Texts differ by their subject far more than by the concept, in both models.
CONTENT_SCALE, NOISE = 6.0, 0.3


class World(NamedTuple):
    """Planted states of an expert and a target on labelled pairs and unlabelled texts."""

    expert: dict[int, Tensor]
    labels: Tensor
    groups: list[str]
    unlabelled: dict[int, Tensor]
    target: Tensor
    truth: Tensor
    direction: Tensor

    def label(self) -> Labelling:
        return label_texts(self.expert, self.labels, self.groups, self.unlabelled, seed=0)


def plant(pairs: int = 40, seed: int = 0, signal: float = 1.0) -> World:
    """A concept that layer 7 of the expert shows with strength `signal`, and layer 3 not at all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    subjects = CONTENT_SCALE * normal(SUBJECTS, CONTENT)
    loads = {layer: normal(CONTENT, EXPERT_WIDTH) / CONTENT**0.5 for layer in LAYERS}
    concept = 3 * torch.nn.functional.normalize(normal(EXPERT_WIDTH), dim=0)
    target_load = normal(CONTENT, TARGET_WIDTH) / CONTENT**0.5
    direction = torch.nn.functional.normalize(normal(TARGET_WIDTH), dim=0)

    def states(subject: Tensor, label: Tensor, layer: int) -> Tensor:
        shown = signal * (label - 0.5)[:, None] * concept if layer == 7 else 0.0
        return subjects[subject] @ loads[layer] + shown + NOISE * normal(len(subject), EXPERT_WIDTH)

    subject = torch.arange(pairs).repeat_interleave(2) % SUBJECTS
    labels = torch.tensor([1, 0] * pairs)
    # Every subject comes with both labels, but reliable speakers prefer the first half of the subjects.
    other = torch.arange(SUBJECTS).repeat(20)
    truth = (torch.rand(len(other), generator=generator) < torch.where(other < SUBJECTS // 2, 0.7, 0.3)).long()
    target = subjects[other] @ target_load + 3 * (truth - 0.5)[:, None] * direction
    return World(
        expert={layer: states(subject, labels, layer) for layer in LAYERS},
        labels=labels,
        groups=[str(index) for index in subject.tolist()],
        unlabelled={layer: states(other, truth, layer) for layer in LAYERS},
        target=target + NOISE * normal(len(other), TARGET_WIDTH),
        truth=truth,
        direction=direction,
    )


def test_labels_come_from_the_layer_that_knows():
    world = plant()
    labelling = world.label()
    assert labelling.layer == 7
    assert labelling.auc > 0.95 and labelling.p_value < 1e-6
    right = (labelling.probabilities > 0.5) == (world.truth == 1)
    assert right.double().mean() > 0.95
    assert min(labelling.confident) > 300


@pytest.mark.parametrize("seed", range(3))
def test_the_concept_goes_over_and_content_does_not(seed):
    world = plant(seed=seed)
    probabilities = world.label().probabilities
    cosine = {
        m: float(labelled_direction(world.target, probabilities, m) @ world.direction) for m in ("matched", "weighted")
    }
    assert cosine["matched"] > 0.95
    assert cosine["weighted"] < cosine["matched"]


@pytest.mark.parametrize("method", ["matched", "weighted", "logistic"])
def test_a_direction_is_a_signed_unit_vector(method):
    world = plant()
    probabilities = world.truth.double() * 0.8 + 0.1
    direction = labelled_direction(world.target, probabilities, method)
    assert direction.dtype == torch.float32 and direction.shape == (TARGET_WIDTH,)
    assert float(direction.norm()) == pytest.approx(1)
    assert float(direction @ world.direction) > 0.2
    torch.testing.assert_close(
        labelled_direction(world.target, 1 - probabilities, method), -direction, atol=1e-3, rtol=0
    )


def test_unsure_texts_weigh_nothing():
    world = plant()
    probabilities = world.label().probabilities
    far = torch.full((50, TARGET_WIDTH), 100.0)
    unsure = torch.full((50,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        labelled_direction(torch.cat([world.target, far]), torch.cat([probabilities, unsure])),
        labelled_direction(world.target, probabilities),
    )


def test_the_same_seed_gives_the_same_labels():
    first, second = plant().label(), plant().label()
    assert torch.equal(first.probabilities, second.probabilities)


def test_an_expert_at_chance_is_refused_with_its_figures():
    world = plant(signal=0.0)
    with pytest.raises(NoSignalError, match=r"area under the curve of 0\.\d+ .* p = .* \(at most 0\.05\)"):
        world.label()
    assert len(unchecked_labels(world.expert, world.labels, world.groups, world.unlabelled, 0).probabilities) == 1200


def test_so_few_rows_that_luck_could_do_it_are_refused():
    with pytest.raises(NoSignalError, match="more labelled rows"):
        plant(pairs=4).label()


def test_fewer_groups_than_can_be_held_out_are_refused():
    with pytest.raises(ValueError, match=r"label 0 come from 3 groups .* at least 4"):
        plant(pairs=3).label()


def test_one_sided_labels_are_refused():
    world = plant()
    of_one_kind = world._replace(unlabelled={layer: each[world.truth == 1] for layer, each in world.unlabelled.items()})
    with pytest.raises(
        ValueError, match=r"one-sided: of \d+ unlabelled texts \d+ are confidently 1, \d+ confidently 0"
    ):
        of_one_kind.label()


def test_too_few_confident_labels_are_refused():
    labelling = Labelling(7, 0.99, 1e-9, 16, 0.1, torch.cat([torch.full((500,), 0.5), torch.tensor([0.9, 0.1] * 15)]))
    with pytest.raises(
        ValueError, match=r"15 of 530 unlabelled texts confidently 1 and 15 confidently 0 \(at least 16"
    ):
        labelling.require_usable()


def test_states_that_are_no_numbers_are_refused():
    world = plant()
    world.unlabelled[7][5, 2] = float("nan")
    with pytest.raises(ValueError, match="layer 7, unlabelled: 1 of 1200 rows"):
        world.label()


def test_labels_of_one_side_only_give_no_direction():
    world = plant()
    with pytest.raises(ValueError, match="1200 texts have a probability above"):
        labelled_direction(world.target, torch.full((1200,), 0.8))
