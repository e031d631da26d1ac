"""The report of an evaluation: everything that was measured, so that others can recompute every figure."""

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from artifacts.evaluation.rows import Task
from artifacts.evaluation.statistics import Interval
from artifacts.jobs.errors import BuildError

SCHEMA: Final = 1
ConditionKind = Literal["off", "on", "negated", "dose", "prompt", "control", "random"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(_Part):
    """How an evaluation is done.

    Attributes:
        seed: of the bootstrap, and of the random directions where they are drawn for it.
        doses: strengths from 0 to the maximum, both included.
        negative_doses: also from 0 to minus the maximum.
        max_new_tokens: of a generated answer.
        exact: `forced` tells exact answers from one forward pass over prompt and answer (greedy decoding gives the
            answer's tokens if and only if each is the likeliest after those before); `generation` compares texts.
        prompt: system prompt that is measured instead of steering; None leaves it out.
        num_examples: questions whose answers the report shows.
    """

    seed: int = 0
    doses: int = Field(default=9, ge=2, le=101)
    negative_doses: bool = False
    max_new_tokens: int = Field(default=32, ge=1)
    exact: Literal["forced", "generation"] = "forced"
    prompt: str | None = None
    num_examples: int = Field(default=8, ge=0)


class About(_Part):
    """What was evaluated.

    Attributes:
        name: of the vector under test.
        subject: model folder or address of the server, with what it says about itself.
        bundle, scope, layers: digest of the bundle, which tokens it steers and at which layers; empty where the vector
            comes from no file.
        recommended, maximum: strengths.
        receipts: through a server, digest of the bundle that every receipt of a vector named, by the vector.
        versions: of the packages that decide the figures.
    """

    name: str
    subject: dict[str, str]
    bundle: str | None = None
    scope: str = "all"
    layers: tuple[int, ...] = ()
    recommended: float
    maximum: float
    receipts: dict[str, str] = {}
    versions: dict[str, str] = {}


class DataFile(_Part):
    """A file of questions: its name and the SHA-256 of its bytes when they were read."""

    path: str
    digest: str


class QuestionInfo(_Part):
    """A question, in the order of the lists of every condition."""

    where: str
    task: Task
    kind: Literal["answer", "pattern", "choices", "neutral"]
    group: str


class JudgeFigures(_Part):
    """Scores of a judge for the answers of one condition.

    Attributes:
        scores: (concept, instruction, fluency), each 0 to 2, by question; None where the judge failed.
        failed: questions without a usable judgement; no figure counts them.
        overall: mean over the judged answers of the harmonic mean (AxBench); None when all failed.
    """

    scores: tuple[tuple[int, int, int] | None, ...]
    failed: int
    overall: Interval | None


class ConditionResult(_Part):
    """One condition, put to all questions.

    Attributes:
        kind, name: what it is; `name` is unique in a report.
        vector, strength: what the subject was told.
        correct: by target question.
        accuracy: share of them.
        likelihood: mean log-likelihood per token of the right answers, in nats; None where no likelihood was measured.
        retained: by retention question; None where not measured.
        retention: accuracy on them over the unsteered one.
        losses: negative log-likelihood of each neutral text in nats, after its first token; None where not measured.
        perplexity_ratio: over unsteered.
        clas: harmonic mean of accuracy and retention (at most 1).
        agreement: share of exact questions on which generation and the forced pass agree, where both were done.
        judge: scores of its answers.
    """

    kind: ConditionKind
    name: str
    vector: str | None
    strength: float
    correct: tuple[bool, ...]
    accuracy: Interval
    likelihood: float | None = None
    retained: tuple[bool, ...] | None = None
    retention: Interval | None = None
    losses: tuple[float, ...] | None = None
    perplexity_ratio: Interval | None = None
    clas: float | None = None
    agreement: float | None = None
    judge: JudgeFigures | None = None


class Draws(_Part):
    """Several draws of one kind of chance, as conditions `{name}-{k}`.

    Attributes:
        mean: accuracy; the interval resamples draws and questions.
        difference: accuracy of `on` minus the mean.
        p_value: one-sided rank of `on` among the draws; at least 1 / (1 + count).
    """

    name: str
    count: int
    mean: Interval
    minimum: float
    maximum: float
    difference: Interval
    p_value: float


class Comparison(_Part):
    """`on` against one other condition on the same questions: exact McNemar, Holm-adjusted over all comparisons."""

    against: str
    difference: Interval
    on_only: int
    other_only: int
    p_value: float
    p_holm: float


class DoseResponse(_Part):
    """Accuracy over strength: names of the conditions by ascending strength, Spearman's rho from 0 upwards."""

    conditions: tuple[str, ...]
    rho: float | None
    p_value: float | None


class GateResult(_Part):
    """A declared bound with both its sides; they are None, and `reason` says why, when a figure was not measured."""

    gate: str
    figure: float | None = None
    bound: float | None = None
    passed: bool
    reason: str = ""

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        if self.figure is None or self.bound is None:
            return f"{word}: {self.gate} ({self.reason})"
        return f"{word}: {self.gate} ({self.figure:.4g} against {self.bound:.4g})"


class Example(_Part):
    """Answers to one question side by side, by condition."""

    question: str
    expected: str
    answers: dict[str, str]


class Report(_Part):
    """Everything that was measured.

    `figures` repeats the figures by the names that gates use; `not_measured` tells for each baseline that is missing
    why. `pairs` are the layer pairs as the bundle's manifest has them.
    """

    schema_version: Literal[1] = SCHEMA
    about: About
    settings: Settings
    data: tuple[DataFile, ...] = ()
    questions: tuple[QuestionInfo, ...]
    tokens: tuple[int, ...]
    conditions: tuple[ConditionResult, ...]
    draws: tuple[Draws, ...]
    comparisons: tuple[Comparison, ...]
    dose_response: DoseResponse
    figures: dict[str, float]
    gates: tuple[GateResult, ...] = ()
    not_measured: dict[str, str]
    examples: tuple[Example, ...] = ()
    pairs: tuple[dict[str, JsonValue], ...] = ()

    def condition(self, name: str) -> ConditionResult:
        """The condition of that name.

        Raises:
            KeyError: there is none.
        """
        for each in self.conditions:
            if each.name == name:
                return each
        raise KeyError(name)


def write_report(path: Path, report: Report) -> None:
    """Write the JSON atomically: a reader sees the old file or the whole new one."""
    write_text(path, report.model_dump_json(indent=1) + "\n")


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote.

    Raises:
        BuildError: it cannot be read or is no report of this schema.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BuildError(f"cannot read the report {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BuildError(f"{path} is no report of schema {SCHEMA}: {place}: {first['msg']}; measure again") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
