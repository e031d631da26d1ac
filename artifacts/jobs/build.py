"""One build: its configuration, where its files are, and the models and data that its steps share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from artifacts.jobs.config import BuildConfig, Layers, ModelSource
from artifacts.jobs.contrast import CHOOSE_SHARE, HELD_SHARE, ContrastSplit, split_contrast
from artifacts.jobs.data import ContrastRow, GroupSplit, NeutralRow, Question, Row, Text, read_rows, split_by_group
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import Examination
from artifacts.jobs.model import CausalModel, load_model
from artifacts.jobs.source import FoundModel, find_model


@dataclass(frozen=True)
class Build:
    """What every step is given.

    Attributes:
        config: checked configuration.
        root: directory that relative paths of the configuration start from.
        work: directory of the steps' results.
        quiet: no progress bars.
    """

    config: BuildConfig
    root: Path
    work: Path
    quiet: bool = False

    def directory(self, step: str) -> Path:
        """Where a step leaves its results."""
        return self.work / step

    def data_path(self, name: str) -> Path:
        """Path of a data file by its key in the configuration."""
        path: Path = self.root / getattr(self.config.data, name)
        return path

    @cached_property
    def target_source(self) -> FoundModel:
        return find_model(self.config.target, self.root)

    @cached_property
    def expert_source(self) -> FoundModel:
        return find_model(self.config.expert, self.root)

    @cached_property
    def target(self) -> CausalModel:
        """The target model, loaded once for all steps."""
        return self._load(self.config.target, self.target_source)

    def load_expert(self, random_seed: int | None = None) -> CausalModel:
        """The expert model, loaded anew; with a seed, the same architecture with random weights."""
        return self._load(self.config.expert, self.expert_source, random_seed)

    @cached_property
    def target_layers(self) -> tuple[int, ...]:
        return _layers(self.config.layers.target, self.target_source.identity.num_layers, "layers.target")

    @cached_property
    def expert_layers(self) -> tuple[int, ...]:
        return _layers(self.config.layers.expert, self.expert_source.identity.num_layers, "layers.expert")

    @cached_property
    def contrast(self) -> list[ContrastRow]:
        """Rows of the contrast set that the direction is read from.

        Raises:
            BuildError: no row of that set, or only one class.
        """
        wanted = self.config.data.contrast_set
        rows = [row for row in self.rows("contrast", ContrastRow) if wanted is None or row.set == wanted]
        labels = {row.label for row in rows}
        if labels != {0, 1}:
            raise BuildError(
                f"{self.data_path('contrast')} has {len(rows)} rows of set {wanted} with labels {sorted(labels)}; "
                "both labels 0 and 1 are needed (data.contrast_set chooses the set)"
            )
        return rows

    @cached_property
    def contrast_split(self) -> ContrastSplit:
        """Parts of the contrast rows."""
        return split_contrast(self.contrast, self.config.seed)

    @cached_property
    def mapping_split(self) -> GroupSplit:
        """Parts of the mapping rows."""
        return split_by_group(self.mapping, CHOOSE_SHARE, HELD_SHARE, self.config.seed)

    @cached_property
    def mapping(self) -> list[Text]:
        return self.rows("mapping", Text)

    @cached_property
    def tuning(self) -> Examination:
        """The tuning split on the target model."""
        return self._examination("tune")

    @cached_property
    def testing(self) -> Examination:
        """The test split on the target model."""
        return self._examination("test")

    def check_data(self) -> None:
        """Read every data file, so that a wrong line is found before the models work for hours.

        Raises:
            BuildError: a file is wrong, or the neutral texts lack a split.
        """
        for name, kind in (("mapping", Text), ("tune", Question), ("test", Question)):
            self.rows(name, kind)
        splits = {row.split for row in self.rows("neutral", NeutralRow)}
        if splits != {"tune", "test"}:
            raise BuildError(f"{self.data_path('neutral')} has split {sorted(splits)}; `tune` and `test` are needed")
        split_contrast(self.contrast, self.config.seed)

    def rows(self, name: str, kind: type[Row]) -> list[Row]:
        """Rows of a data file by its key in the configuration."""
        return read_rows(self.data_path(name), kind)

    def _examination(self, split: str) -> Examination:
        neutral = [row for row in self.rows("neutral", NeutralRow) if row.split == split]
        config = self.config
        return Examination(
            self.target, self.rows(split, Question), neutral, config.batch_tokens, config.tune.max_new_tokens
        )

    def _load(self, source: ModelSource, found: FoundModel, random_seed: int | None = None) -> CausalModel:
        return load_model(source.model, found.directory, self.config.dtype, self.config.device, random_seed)


def _layers(choice: Layers, num_layers: int, key: str) -> tuple[int, ...]:
    if choice == "all":
        return tuple(range(num_layers))
    wrong = [layer for layer in choice if layer >= num_layers]
    if wrong:
        raise BuildError(f"{key} names layer {wrong[0]}; the model has {num_layers}, so the last is {num_layers - 1}")
    return tuple(sorted(set(choice)))
