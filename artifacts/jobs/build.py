"""One build: its configuration, where its files are, and the models and data that its steps share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from artifacts.jobs.config import BuildConfig, Layers, ModelSource
from artifacts.jobs.contrast import CHOOSE_SHARE, HELD_SHARE, ContrastSplit, first_half, split_contrast
from artifacts.jobs.data import (
    ContrastRow,
    GroupSplit,
    NeutralRow,
    Question,
    RetentionRow,
    Row,
    Text,
    content,
    read_contrast,
    read_rows,
    refuse_shared_templates,
    repeats,
    shared_contents,
    split_by_group,
)
from artifacts.jobs.errors import BuildError
from artifacts.jobs.measure import Examination
from artifacts.jobs.model import CausalModel, load_model
from artifacts.jobs.source import FoundModel, find_model
from artifacts.vectors.stability import group_numbers

DATA_FILES = ("contrast", "mapping", "tune", "test", "neutral", "retention")


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
    def _contrast_rows(self) -> list[ContrastRow]:
        """Every contrast row of the chosen set.

        Raises:
            BuildError: no row of that set, or only one class.
        """
        wanted = self.config.data.contrast_set
        rows = [row for row in read_contrast(self.data_path("contrast")) if wanted is None or row.set == wanted]
        labels = {row.label for row in rows}
        if labels != {0, 1}:
            raise BuildError(
                f"{self.data_path('contrast')} has {len(rows)} rows of set {wanted} with labels {sorted(labels)}; "
                "both labels 0 and 1 are needed (data.contrast_set chooses the set)"
            )
        return rows

    @cached_property
    def contrast(self) -> list[ContrastRow]:
        """Rows that the direction is read from."""
        if not self._halved:
            return self._contrast_rows
        mapped = first_half(self._contrast_rows, self.config.seed)
        return [row for row, taken in zip(self._contrast_rows, mapped, strict=True) if not taken]

    @cached_property
    def contrast_split(self) -> ContrastSplit:
        """Parts of the contrast rows."""
        return split_contrast(self.contrast, self.config.seed)

    @cached_property
    def contrast_groups(self) -> Tensor:
        """[num_contrast_rows], int64, equal for rows of one group; a row without a group is its own."""
        return group_numbers([row.group if row.group is not None else content(row) for row in self.contrast])

    @cached_property
    def mapping(self) -> list[Text]:
        """Texts that the aligner is fitted on; labels play no part."""
        if self.config.align.prompts == "same":
            return list(self._contrast_rows)
        if self.config.data.mapping is not None:
            return self.rows("mapping", Text)
        mapped = first_half(self._contrast_rows, self.config.seed)
        return [row for row, taken in zip(self._contrast_rows, mapped, strict=True) if taken]

    @cached_property
    def mapping_split(self) -> GroupSplit:
        """Parts of the mapping rows."""
        return split_by_group(self.mapping, CHOOSE_SHARE, HELD_SHARE, self.config.seed)

    @property
    def prompts_differ(self) -> bool:
        """Whether the aligner and the direction are fitted on different texts."""
        return shared_contents(self.mapping, self.contrast) == 0

    @property
    def _halved(self) -> bool:
        """Whether the contrast rows have to serve for the aligner too."""
        return self.config.data.mapping is None and self.config.align.prompts == "other"

    @cached_property
    def tuning(self) -> Examination:
        """The tuning split on the target model."""
        neutral = [row for row in self.rows("neutral", NeutralRow) if row.split == "tune"]
        retention = self.retention("tune")
        return Examination(self.target, self.rows("tune", Question), neutral, self.config.batch_tokens, retention)

    def retention(self, split: str) -> list[RetentionRow]:
        """Retention questions of one split; none without such a file."""
        if self.config.data.retention is None:
            return []
        return [row for row in self.rows("retention", RetentionRow) if row.split == split]

    @property
    def data_files(self) -> dict[str, Path]:
        """Every data file that the configuration names, by its key."""
        paths = {name: getattr(self.config.data, name) for name in DATA_FILES}
        return {name: self.root / path for name, path in paths.items() if path is not None}

    def check_data(self) -> list[str]:
        """Read every data file, so that a wrong line is found before the models work for hours.

        Returns:
            What a user should know and may leave so: rows that repeat others.

        Raises:
            BuildError: a file is wrong, two splits share a template, or the neutral texts lack a split.
        """
        questions = {name: self.rows(name, Question) for name in ("tune", "test")}
        refuse_shared_templates(
            {"fit": [*self.contrast, *self.mapping], "tune": questions["tune"], "test": questions["test"]}
        )
        self._check_splits("neutral", {row.split for row in self.rows("neutral", NeutralRow)})
        if self.config.data.retention is not None:
            self._check_splits("retention", {row.split for row in self.rows("retention", RetentionRow)})
        split_contrast(self.contrast, self.config.seed)
        split_by_group(self.mapping, CHOOSE_SHARE, HELD_SHARE, self.config.seed)
        again = repeats(self.mapping)
        if not again:
            return []
        return [f"{len(again)} mapping rows repeat others, the first is {again[0].again.where}; each counts"]

    def _check_splits(self, name: str, found: set[str]) -> None:
        if found != {"tune", "test"}:
            raise BuildError(f"{self.data_path(name)} has split {sorted(found)}; `tune` and `test` are needed")

    def rows(self, name: str, kind: type[Row]) -> list[Row]:
        """Rows of a data file by its key in the configuration."""
        return read_rows(self.data_path(name), kind)

    def _load(self, source: ModelSource, found: FoundModel, random_seed: int | None = None) -> CausalModel:
        return load_model(source.model, found.directory, self.config.dtype, self.config.device, random_seed)


def _layers(choice: Layers, num_layers: int, key: str) -> tuple[int, ...]:
    if choice == "all":
        return tuple(range(num_layers))
    wrong = [layer for layer in choice if layer >= num_layers]
    if wrong:
        raise BuildError(f"{key} names layer {wrong[0]}; the model has {num_layers}, so the last is {num_layers - 1}")
    return tuple(sorted(set(choice)))
