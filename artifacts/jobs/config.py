"""Configuration of a build: one YAML file, checked before anything is loaded."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from artifacts.jobs.errors import BuildError


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))


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


class DataFiles(Section):
    """JSON Lines files, relative to the configuration file. `artifacts.jobs.data` has the fields of each."""

    contrast: Path
    mapping: Path
    tune: Path
    test: Path
    neutral: Path
    # Only rows of the contrast file with this `set`; None takes all of them.
    contrast_set: int | None = None


class LayerChoice(Section):
    """Which decoder layers (0-based) may be paired."""

    expert: Layers = "all"
    target: Layers = "all"


class AlignSettings(Section):
    """The map from the expert's states to the target's."""

    method: Literal["ridge"] = "ridge"
    # Multiples of the mean variance per dimension; chosen on held-out pairs.
    regularisation: Grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    max_components: int = Field(default=1024, ge=2)
    permutations: int = Field(default=100, ge=20)


class PairingSettings(Section):
    """Which (expert layer, target layer) pairs are used."""

    method: Literal["held-out"] = "held-out"
    pairs: int = Field(default=1, ge=1)
    # Pairs, best first, for which every kind of vector is tuned.
    shortlist: int = Field(default=4, ge=1)
    strengths: Grid = (0.3, 0.5, 0.8)


class VectorSettings(Section):
    """Which directions compete. RFM vectors are computed and stored whether or not they compete."""

    methods: Annotated[tuple[Literal["diffmean", "rfm"], ...], Field(min_length=1)] = ("diffmean", "rfm")
    components: int = Field(default=64, ge=32, le=128)
    iterations: int = Field(default=5, ge=1)
    # Sign of the correlation with the labels, for a concept whose projection shows none.
    sign: Literal[-1, 1] | None = None


class TuneSettings(Section):
    """Strength, in units of the layer's median norm."""

    strengths: Grid = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    # Largest allowed perplexity of neutral text, steered over unsteered.
    perplexity_budget: float = Field(default=1.25, gt=1, allow_inf_nan=False)
    # None: the longest answer of the file and two tokens more.
    max_new_tokens: int | None = Field(default=None, ge=1)
    # Least gain in accuracy on the tuning split; below it the build is refused.
    minimum_gain: float = Field(default=0.0, ge=-1, le=1)


class EvaluateSettings(Section):
    """What the test split is measured with."""

    random_directions: int = Field(default=30, ge=30)
    # Also repeat everything with an untrained expert of the same shape.
    controls: bool = False


class BuildConfig(Section):
    """Everything that decides the content of a bundle."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    licence: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    target: ModelSource
    expert: ModelSource
    data: DataFiles
    layers: LayerChoice = LayerChoice()
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


def load_config(path: Path) -> BuildConfig:
    """Read a configuration.

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
    try:
        return BuildConfig.model_validate(content)
    except ValidationError as error:
        causes = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BuildError(f"{path}: {causes}") from None
