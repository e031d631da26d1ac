"""Whether the fit, tuning and test data share anything."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from artifacts.jobs.build import Build
from artifacts.jobs.data import Question, Text, shared_contents
from artifacts.jobs.errors import BuildError


@dataclass(frozen=True)
class Overlap:
    """Distinct texts that two data files share, and groups that two splits share. All zero is best."""

    mapping_and_contrast: int
    fit_and_tune: int
    fit_and_test: int
    tune_and_test: int
    fit_and_tune_groups: int
    fit_and_test_groups: int
    tune_and_test_groups: int

    @property
    def disjoint(self) -> bool:
        """Whether fit, tuning and test splits share neither texts nor groups."""
        texts = self.fit_and_tune + self.fit_and_test + self.tune_and_test
        return not texts + self.fit_and_tune_groups + self.fit_and_test_groups + self.tune_and_test_groups


def overlap(build: Build) -> Overlap:
    """Compare the splits of a build."""
    fit = [*build.contrast, *build.mapping]
    tune, test = build.rows("tune", Question), build.rows("test", Question)
    return Overlap(
        mapping_and_contrast=shared_contents(build.mapping, build.contrast),
        fit_and_tune=shared_contents(fit, tune),
        fit_and_test=shared_contents(fit, test),
        tune_and_test=shared_contents(tune, test),
        fit_and_tune_groups=_shared_groups(fit, tune),
        fit_and_test_groups=_shared_groups(fit, test),
        tune_and_test_groups=_shared_groups(tune, test),
    )


def refuse_overlap(build: Build) -> None:
    """Check that fitting, tuning and test data share nothing.

    Raises:
        BuildError: they do; the counts are named.
    """
    found = overlap(build)
    if not found.disjoint:
        shared = {name: count for name, count in asdict(found).items() if count and name != "mapping_and_contrast"}
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in shared.items())
        raise BuildError(
            f"the splits share texts or groups ({counts}), so the figures would flatter the vector; give every "
            "text and every group to one split"
        )


def _shared_groups(first: Sequence[Text], second: Sequence[Text]) -> int:
    return len(({row.group for row in first} & {row.group for row in second}) - {None})
