"""Step 9: the test split, once, against every control, as `expertsteer eval` would measure it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.evaluation.gates import check_gates, parse_gate
from artifacts.evaluation.html import write_html
from artifacts.evaluation.local import LocalSubject, random_rows
from artifacts.evaluation.plan import Baselines
from artifacts.evaluation.rows import Questionnaire, read_questionnaire
from artifacts.evaluation.run import evaluate
from artifacts.evaluation.schema import (
    About,
    ConditionResult,
    DataFile,
    Draws,
    Report,
    Settings,
    read_report,
    write_report,
)
from artifacts.evaluation.statistics import Interval
from artifacts.evaluation.subject import Condition
from artifacts.jobs.build import Build
from artifacts.jobs.controls import control_rows, load_controls
from artifacts.jobs.matrix import layer_matrix
from artifacts.jobs.tune import load_tuned, write_rows
from artifacts.jobs.workdir import file_digest

NAME = "evaluate"
REPORT = "report.json"
PAGE = "report.html"
_FILES = ("test", "neutral", "retention")


def settings(build: Build) -> object:
    """What decides the figures, apart from the tuned vectors."""
    return {
        "name": [build.config.name, build.target_source.identity.id],
        "evaluate": build.config.evaluate.model_dump(exclude={"control_draws"}),
        "seed": build.config.seed,
        "files": list(_digests(build).values()),
    }


def run(build: Build) -> None:
    """Measure the tuned vectors and their controls."""
    directory = build.directory(NAME)
    gates = [parse_gate(text) for text in build.config.evaluate.gates]
    report = _measure(build)
    files = [DataFile(path=path.name, digest=digest) for path, digest in _digests(build).items()]
    report = report.model_copy(
        update={
            "gates": check_gates(gates, report.figures),
            "data": tuple(files),
            "pairs": tuple(layer_matrix(build)),
        }
    )
    write_report(directory / REPORT, report)
    write_html(directory / PAGE, report)


def load_evaluation(build: Build) -> Report:
    """The result of the step."""
    return read_report(build.directory(NAME) / REPORT)


def failed_gates(build: Build) -> list[str]:
    """Declared gates that the figures miss, as lines to print."""
    return [str(gate) for gate in load_evaluation(build).gates if not gate.passed]


def report_figures(report: Report) -> dict[str, Any]:
    """The report as the manifest keeps it; `test` has one entry per condition and one per kind of chance."""
    single = {each.name: _condition(each) for each in report.conditions if each.kind not in ("dose", "random")}
    drawn = {each.name: _draws(each) for each in report.draws}
    # Single draws of a kind of chance are in the report; the bundle keeps what they say together.
    kept = {name: figures for name, figures in single.items() if name.rpartition("-")[0] not in drawn}
    doses = [report.condition(name) for name in report.dose_response.conditions]
    return {
        "test": {"questions": len(report.condition("off").correct), **kept, **drawn},
        "dose_response": [{"strength": each.strength, **_condition(each)} for each in doses],
        "spearman": report.dose_response.rho,
        "gap_closed": {
            name.removeprefix("gap_closed."): share
            for name, share in report.figures.items()
            if name.startswith("gap_closed.")
        },
        "p_holm": {each.against: each.p_holm for each in report.comparisons},
        "gates": {each.gate: each.passed for each in report.gates},
        "not_measured": report.not_measured,
    }


def _digests(build: Build) -> dict[Path, str]:
    """SHA-256 of every file that the figures come from."""
    return {path: file_digest(path) for name, path in build.data_files.items() if name in _FILES}


def _measure(build: Build) -> Report:
    config, tuned = build.config, load_tuned(build)
    rows, strength = write_rows(build, tuned), tuned.recommended.strength
    controls, tensors = load_controls(build)
    drawn = random_rows(rows, config.evaluate.random_directions, config.seed)
    # A bundle's name cannot begin with a tilde.
    vectors = {config.name: rows}
    vectors |= {f"~control.{name}": control_rows(tensors, name) for name in controls.strengths}
    vectors |= {f"~random-{index}": each for index, each in enumerate(drawn)}
    baselines = Baselines(
        {name: Condition(f"~control.{name}", each) for name, each in controls.strengths.items()},
        [Condition(f"~random-{index}", strength) for index in range(len(drawn))],
        controls.missing,
    )
    about = About(
        name=config.name,
        subject={"model": build.target_source.identity.id},
        layers=tuple(sorted(rows)),
        recommended=strength,
        maximum=tuned.maximum_strength,
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    return evaluate(
        LocalSubject(build.target, vectors, config.batch_tokens),
        _questionnaire(build),
        about,
        baselines,
        Settings(seed=config.seed, prompt=config.evaluate.prompt),
        expert=LocalSubject(build.load_expert(), {}, config.batch_tokens),
        quiet=build.quiet,
    )


def _questionnaire(build: Build) -> Questionnaire:
    files = build.data_files
    return read_questionnaire([files["test"], files["neutral"]], [files["retention"]] if "retention" in files else [])


def _condition(result: ConditionResult) -> dict[str, Any]:
    figures: dict[str, Any] = {"strength": result.strength, **_interval("accuracy", result.accuracy)}
    figures |= _interval("perplexity_ratio", result.perplexity_ratio) | _interval("retention", result.retention)
    return figures if result.likelihood is None else figures | {"likelihood": result.likelihood}


def _draws(draws: Draws) -> dict[str, Any]:
    return {
        "count": draws.count,
        **_interval("mean", draws.mean),
        "minimum": draws.minimum,
        "maximum": draws.maximum,
        "p_value": draws.p_value,
    }


def _interval(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {}
    return {name: interval.value, f"{name}_interval": [interval.low, interval.high]}
