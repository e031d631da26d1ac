"""What a build costs before it starts: a small model of work, disk and memory.

A forward pass takes 2 floating-point operations per parameter and token (Kaplan et al. 2020, arXiv 2001.08361);
everything else is counted by its largest matrix product. `expertsteer build --dry-run` prints `FORMULAE`.
"""

from dataclasses import dataclass
from typing import Final

from artifacts.jobs.measure import MAX_LOGITS
from artifacts.jobs.shape import ModelShape
from artifacts.jobs.shards import StorageDtype, bytes_per_row

FORMULAE: Final = (
    "forward pass: 2 x parameters x tokens operations",
    "states on disk: rows x layers x hidden size x bytes per number, for each model and for the untrained control",
    "align (ridge): 4 x rows x rank x min(width, 256) operations x (permutations + 1) for each layer pair",
    "mutual information: (2 x rows x r^2 + r^3 / 3) x permutations x layer pairs",
    "vectors: rows^2 x (2 x components + rows / 3) x iterations for each RFM",
    "a trial: one forward pass over the questions with their answers, the retention questions and the neutral texts",
    "bundle: 4 bytes x (2 maps of expert width x target width for each steered pair + vectors and controls)",
    "memory: weights of both models + one batch of activations and logits + 3 times one layer's states in float64",
)
# A forward pass does not reach the rate of one large matrix product.
EFFICIENCY: Final = 0.4
_SKETCH: Final = 256


@dataclass(frozen=True)
class Workload:
    """Rows and tokens of a build. Tokens are those of the model that reads them."""

    expert: ModelShape
    target: ModelShape
    expert_layers: int
    target_layers: int
    contrast_rows: int
    mapping_rows: int
    expert_tokens: int
    target_tokens: int
    tune_tokens: int
    test_tokens: int
    asked_tokens: int
    storage_dtype: StorageDtype
    batch_tokens: int
    align_rank: int
    align_permutations: int
    information_components: int
    information_permutations: int
    tries_all_pairs: bool
    pair_strengths: int
    shortlist: int
    pairs: int
    maps: bool
    kinds: int
    finalists: int
    strengths: int
    doses: int
    rfm_components: int
    rfm_iterations: int
    resamples: int
    chance_controls: int
    random_directions: int


@dataclass(frozen=True)
class StepCost:
    """Work of one step.

    Attributes:
        name, what: for the plan.
        forward: floating-point operations of the models, on their device in their dtype.
        algebra: operations on states, on the CPU in float64.
        disk_bytes: that it leaves.
    """

    name: str
    what: str
    forward: float = 0.0
    algebra: float = 0.0
    disk_bytes: int = 0


def step_costs(load: Workload) -> list[StepCost]:
    """The cost of every step, in order; steps of milliseconds are left out."""
    pairs = load.expert_layers * load.target_layers
    tried = pairs if load.tries_all_pairs else load.shortlist
    rank = min(load.align_rank, load.mapping_rows, load.expert.hidden_size)
    width = min(load.target.hidden_size, _SKETCH)
    trial = 2.0 * load.target.parameters * load.tune_tokens
    test = 2.0 * load.target.parameters * load.test_tokens
    asked = 2.0 * load.target.parameters * load.asked_tokens
    expert_pass = 2.0 * load.expert.parameters * load.expert_tokens
    tuned = load.shortlist * load.kinds * load.pair_strengths + load.finalists * load.strengths
    # Off, on, negated, prompt, own, untrained and the other doses; draws of chance answer the questions only.
    full, draws = 6 + load.doses, load.random_directions + load.chance_controls
    return [
        StepCost(
            "capture",
            f"{load.expert_tokens + load.target_tokens:,} tokens",
            forward=expert_pass + 2.0 * load.target.parameters * load.target_tokens,
            disk_bytes=_states_bytes(load, load.expert, load.expert_layers)
            + _states_bytes(load, load.target, load.target_layers),
        ),
        StepCost(
            "align",
            f"{pairs} maps, {load.align_permutations} permutations each",
            algebra=4.0 * load.mapping_rows * rank * width * (load.align_permutations + 1) * pairs,
        ),
        StepCost(
            "pair",
            f"{tried} pairs x {load.pair_strengths} trials",
            forward=tried * load.pair_strengths * trial,
            algebra=_information(load) * pairs,
        ),
        StepCost("vectors", f"{_rfm_count(load)} RFMs", algebra=_rfm(load) * _rfm_count(load)),
        StepCost("tune", f"{tuned} trials", forward=tuned * trial),
        StepCost("diagnose", f"{6 * load.resamples} refits", algebra=6 * load.resamples * _rfm(load)),
        StepCost(
            "controls",
            f"untrained expert, {(1 + load.expert_layers) * load.strengths} trials",
            forward=expert_pass + (1 + load.expert_layers) * load.strengths * trial,
            algebra=load.chance_controls * _rfm(load),
            disk_bytes=_states_bytes(load, load.expert, load.expert_layers),
        ),
        StepCost(
            "evaluate",
            f"{full} passes over the test split, {draws} over its questions",
            forward=full * test + draws * asked,
        ),
    ]


def peak_memory(load: Workload) -> int:
    """Bytes at the worst moment: the target stays loaded while the expert comes for its controls."""
    weights = sum(each.parameters * each.bytes_per_weight for each in (load.expert, load.target))
    logits = min(MAX_LOGITS, load.batch_tokens * load.target.vocab_size) * (4 + load.target.bytes_per_weight)
    activations = load.batch_tokens * max(load.expert.hidden_size, load.target.hidden_size) * 16 * 4
    rows = max(load.contrast_rows, load.mapping_rows)
    states = 3 * rows * max(load.expert.hidden_size, load.target.hidden_size) * 8
    return int(weights + logits + activations + states)


def bundle_bytes(load: Workload) -> int:
    """Size of the bundle: encoder and decoder of every steered pair, RFM vectors, and the control vectors."""
    maps = 2 * load.pairs * load.expert.hidden_size * load.target.hidden_size if load.maps else 0
    vectors = load.expert_layers * (load.expert.hidden_size + load.rfm_components)
    return 4 * (maps + vectors + load.pairs * load.target.hidden_size * (3 + load.chance_controls))


def _states_bytes(load: Workload, model: ModelShape, layers: int) -> int:
    return (load.contrast_rows + load.mapping_rows) * bytes_per_row(layers, model.hidden_size, load.storage_dtype)


def _information(load: Workload) -> float:
    r = load.information_components
    return (2.0 * load.mapping_rows * r**2 + r**3 / 3) * load.information_permutations


def _rfm(load: Workload) -> float:
    rows = load.contrast_rows
    return float(rows**2 * (2 * load.rfm_components + rows / 3) * load.rfm_iterations)


def _rfm_count(load: Workload) -> int:
    return load.expert_layers + 2 * load.shortlist
