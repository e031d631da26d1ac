"""Configuration of a build: one YAML file, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from artifacts.evaluation.gates import parse_gate
from artifacts.jobs.errors import BuildError
from artifacts.jobs.position import parse_position
from artifacts.jobs.preset import PRESETS, merged


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))


def _position(text: str) -> str:
    parse_position(text)
    return text


def _gate(text: str) -> str:
    parse_gate(text)
    return text


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Grid = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_ascending)]
Layers = Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(Section):
    """A causal language model.

    `model` is a directory, relative to the configuration file, or a Hugging Face id; `id` is the name that the bundle
    shows, by default the hub id or the directory's own name, never a path of this machine.
    """

    model: str
    id: str | None = None
    revision: str | None = None


class CaptureSettings(Section):
    """How states are kept; bfloat16 halves the disk."""

    storage_dtype: Literal["float32", "bfloat16"] = "float32"


class DataFiles(Section):
    """JSON Lines files, relative to the configuration file. `artifacts.jobs.data` has the fields of each."""

    contrast: Path
    # Without it the aligner is fitted on the texts of half of the contrast groups and the direction on the other half.
    mapping: Path | None = None
    tune: Path
    test: Path
    neutral: Path
    # Questions on other subjects; steering may cost at most `tune.retention_budget` of their accuracy.
    retention: Path | None = None
    # Only rows of the contrast file with this `set`; None takes all of them.
    contrast_set: int | None = None
    # Where a row's state is read: last, last-prompt, mean-response or token:TOKEN.
    position: Annotated[str, AfterValidator(_position)] = "last"


class LayerChoice(Section):
    """Which decoder layers (0-based) may be paired."""

    expert: Layers = "all"
    target: Layers = "all"


class AlignSettings(Section):
    """The way from the expert's states to the target's.

    `labeller` maps nothing: a probe on the expert's states labels the mapping texts and the target's own vector is
    fitted on those labels. `autoencoder` is the paper's; it never sees the target, so its R^2 is not held against it
    and the random directions of the evaluation tell what it is worth.
    """

    method: Literal["ridge", "procrustes", "cca", "joint", "autoencoder", "labeller"] = "ridge"
    # Multiples of the mean variance per dimension; chosen on held-out pairs.
    regularisation: Grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    max_components: int = Field(default=1024, ge=2)
    # Of the pairs against the reconstruction in `joint`.
    joint_weight: Positive = 1.0
    permutations: int = Field(default=100, ge=20)
    # `other`: fitted on other prompts than the direction, so that the map cannot smuggle the target's own direction in.
    prompts: Literal["other", "same"] = "other"


class PairingSettings(Section):
    """Which (expert layer, target layer) pairs are used."""

    method: Literal["held-out", "low-mi", "high-mi", "same-depth"] = "held-out"
    pairs: int = Field(default=1, ge=1)
    # Pairs, best first, for which every kind of vector is tuned.
    shortlist: int = Field(default=4, ge=1)
    strengths: Grid = (0.3, 0.5, 0.8)
    # Every layer in one pair at most; the paper does not say.
    one_to_one: bool = False
    # Whitened components per side, permutations and false-discovery rate of the mutual information.
    components: int = Field(default=32, ge=2, le=64)
    permutations: int = Field(default=100, ge=20)
    false_discovery_rate: float = Field(default=0.05, gt=0, lt=1)


class VectorSettings(Section):
    """Which directions compete; `auto` lets all of them. RFM vectors are always computed and stored."""

    methods: (
        Literal["auto"]
        | Annotated[tuple[Literal["diffmean", "rfm", "logistic", "pca", "lda"], ...], Field(min_length=1)]
    ) = "auto"
    # Fit on mapped states, or in the expert's space and map the direction.
    order: Literal["align-then-fit", "fit-then-map", "both"] = "both"
    components: int = Field(default=64, ge=32, le=128)
    iterations: int = Field(default=5, ge=1)
    # Sign of the correlation with the labels, for a concept whose projection shows none.
    sign: Literal[-1, 1] | None = None
    # Resamples behind the stability of the chosen direction.
    resamples: int = Field(default=10, ge=10)


class TuneSettings(Section):
    """Strength, in units of the layer's median norm."""

    # What is maximised: the share of exact greedy answers, or the mean log-likelihood per token of the answers.
    objective: Literal["exact", "likelihood"] = "exact"
    strengths: Grid = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    # Candidates that are tried at every strength; the others stop after pairing.strengths.
    finalists: int = Field(default=4, ge=1)
    # Largest allowed perplexity of neutral text, steered over unsteered.
    perplexity_budget: float = Field(default=1.25, gt=1, allow_inf_nan=False)
    # Largest allowed loss of accuracy on the retention questions.
    retention_budget: float = Field(default=0.02, ge=0, lt=1)
    # Least gain in the objective on the tuning split; below it the build is refused.
    minimum_gain: float = Field(default=0.0, ge=-1, le=1)


class EvaluateSettings(Section):
    """What the test split is measured with."""

    random_directions: int = Field(default=30, ge=30)
    # Draws of permuted labels, of shuffled pairs, and fresh initialisations of an auto-encoder.
    control_draws: int = Field(default=10, ge=10)
    # System prompt that asks for the behaviour in words: the baseline that a prompt alone is.
    prompt: str | None = None
    # Conditions on the figures, as of `expertsteer eval --gate`; a failed one makes the exit code 3.
    gates: tuple[Annotated[str, AfterValidator(_gate)], ...] = ()


class BuildConfig(Section):
    """Everything that decides the content of a bundle."""

    preset: Literal["recommended", "paper"] = "recommended"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    licence: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    target: ModelSource
    expert: ModelSource
    data: DataFiles
    layers: LayerChoice = LayerChoice()
    capture: CaptureSettings = CaptureSettings()
    align: AlignSettings = AlignSettings()
    pairing: PairingSettings = PairingSettings()
    vectors: VectorSettings = VectorSettings()
    tune: TuneSettings = TuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Threads of torch on the CPU; None leaves torch's choice.
    threads: int | None = Field(default=None, ge=1)
    # Padded tokens of one forward pass.
    batch_tokens: int = Field(default=8192, ge=1)


def load_config(path: Path, changes: Sequence[Mapping[str, Any]] = ()) -> BuildConfig:
    """Read a configuration.

    Args:
        path: of the YAML file.
        changes: nested mappings laid over the file, later ones win; those of the command line.

    Raises:
        BuildError: unreadable, not YAML, or a key that is unknown, missing or out of bounds (all of them are named).
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BuildError(f"{path} holds a {type(content).__name__}; a mapping of keys is needed")
    content = merged(content, *changes)
    # The preset lies under the file's own keys; the command line lays its keys over them once more.
    content = merged(PRESETS.get(str(content.get("preset")), {}), content)
    try:
        return BuildConfig.model_validate(content)
    except ValidationError as error:
        causes = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BuildError(f"{path}: {causes}") from None


def parse_change(text: str) -> Mapping[str, Any]:
    """`align.method=cca` as the nested mapping that `load_config` takes; the value is YAML.

    Raises:
        ValueError: not of that form.
    """
    keys, equals, value = text.partition("=")
    if not equals or not all(keys.split(".")):
        raise ValueError(f"{text!r} is not of the form key.key=value")
    try:
        content: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {text!r} is not YAML") from error
    for key in reversed(keys.split(".")):
        content = {key: content}
    change: Mapping[str, Any] = content
    return change
