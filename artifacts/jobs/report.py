"""Tables of a build: after one step from its result, and at the end from the bundle's own manifest."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from artifacts.bundle import Bundle
from artifacts.jobs.align import AlignScore, align_scores
from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms
from artifacts.jobs.controls import load_controls
from artifacts.jobs.diagnose import Diagnosis, load_diagnoses
from artifacts.jobs.evaluate import PAGE, load_evaluation, report_figures
from artifacts.jobs.pair import pair_scores, shortlist
from artifacts.jobs.probe import Probed, load_probed
from artifacts.jobs.tune import load_tuned
from artifacts.jobs.vectors import load_directions

# Rows of a table that is sorted by what matters.
_LONGEST = 12
_WIDTH = 120
_ORDER: Final = ("off", "on", "negated", "prompt", "expert", "own", "untrained", "random")


def print_report(bundle: Bundle, path: Path, console: Console | None = None) -> None:
    """Print what the bundle is and how it did, from its own manifest."""
    out = console or _console()
    manifest = bundle.manifest
    figures: Any = manifest.evaluation
    out.print(_candidates_table(figures))
    out.print(_test_table(figures))
    chosen = ", ".join(f"expert {pair.expert} -> target {pair.target}" for pair in manifest.layer_pairs)
    out.print(f"chosen: {', '.join(figures['vectors'])} (layers {chosen})")
    for each in figures["stability"]:
        out.print(
            f"stability of {each['key']}: cosine of bootstrap refits {each['mean']:.3f} (5 % {each['low']:.3f}), "
            f"of two halves {each['halves']:.3f}, with 20 % of the labels flipped {each['flips']['0.2']:.3f}"
        )
    if figures["suspects"]:
        lines = ", ".join(str(each["line"]) for each in figures["suspects"])
        out.print(f"suspected labels: lines {lines} of the contrast file")
    out.print(
        f"recommended strength {manifest.recommended_strength:g}, maximum {manifest.maximum_strength:g} "
        "(in median norms of the layer)"
    )
    out.print(f"aligner texts and direction texts disjoint: {_yes(figures['aligner_and_direction_disjoint'])}")
    out.print(f"fit, tuning and test splits disjoint: {_yes(figures['splits_disjoint'])}")
    for name, reason in figures["not_measured"].items():
        out.print(f"not measured: {name}: {reason}")
    out.print(f"{path}  {bundle.num_bytes / 1e6:.2f} MB  {bundle.digest}", soft_wrap=True)


def print_step(build: Build, step: str, console: Console | None = None) -> None:
    """Print what one step found."""
    (console or _console()).print(_STEPS[step](build))


def _console() -> Console:
    """The terminal, or lines long enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _capture(build: Build) -> Table:
    table = _table("Target's median norm", "layer", "norm")
    for layer, norm in layer_norms(build).items():
        table.add_row(str(layer), _number(norm))
    return table


def _probe(build: Build) -> Table:
    probed: Any = TypeAdapter(Probed).dump_python(load_probed(build))
    table = _table(
        "The expert's held-out probes", "layer", "AUC", "interval (95 % together)", caption=_suspects(probed)
    )
    for each in probed["layers"]:
        table.add_row(str(each["layer"]), _number(each["auc"]), f"[{each['low']:.3f}, {each['high']:.3f}]")
    return table


def _suspects(probed: Any) -> str:
    lines = [f"line {each['line']} (p = {each['probability']:.2g})" for each in probed["suspects"][:_LONGEST]]
    return f"suspected labels: {len(probed['suspects'])}" + (f": {', '.join(lines)}" if lines else "")


def _align(build: Build) -> Table:
    scores: list[AlignScore] = align_scores(build)
    names = list(scores[0].figures)
    table = _table(f"Aligners ({build.config.align.method})", "expert", "target", *names, "accepted")
    for each in scores:
        figures = [_number(each.figures[name]) for name in names]
        table.add_row(str(each.expert), str(each.target), *figures, _yes(each.accepted))
    return table


def _pair(build: Build) -> Table:
    scores = {(each.expert, each.target): each for each in pair_scores(build)}
    table = _table(f"Pairs by {build.config.pairing.method}", "expert", "target", "gain", "strength", "perplexity")
    for pair in shortlist(build):
        score = scores[pair]
        best = (_number(score.best.strength, "g"), _ratio(score.best.perplexity_ratio)) if score.best else ("-", "-")
        table.add_row(str(pair[0]), str(pair[1]), _number(score.gain, "+.3f"), *best)
    return table


def _vectors(build: Build) -> Table:
    found = load_directions(build)
    table = _table("Directions", "direction", "held-out AUC", "")
    for name in sorted(found.auc, key=lambda name: -found.auc[name]):
        table.add_row(name, _number(found.auc[name]), "")
    for name, reason in found.refused.items():
        table.add_row(name, "refused", reason)
    return table


def _tune(build: Build) -> Table:
    candidates = {each.key: each.best._asdict() for each in load_tuned(build).candidates}
    figures = {"tune": {"candidates": candidates}, "held_out_auc": load_directions(build).auc}
    return _candidates_table(figures | {"objective": build.config.tune.objective})


def _diagnose(build: Build) -> Table:
    found: Any = TypeAdapter(tuple[Diagnosis, ...]).dump_python(load_diagnoses(build))
    table = _table("Cosine of refits", "direction", "bootstrap", "5 %", "halves", "5 % flipped", "10 %", "20 %")
    for each in found:
        flips = [_number(value) for value in each["flips"].values()]
        table.add_row(each["key"], _number(each["mean"]), _number(each["low"]), _number(each["halves"]), *flips)
    return table


def _controls(build: Build) -> Table:
    controls = load_controls(build)[0]
    table = _table("Controls", "control", "strength", "")
    for name, strength in controls.strengths.items():
        table.add_row(name, _number(strength, "g"), "")
    for name, reason in controls.missing.items():
        table.add_row(name, "-", reason)
    return table


def _evaluate(build: Build) -> Table:
    table = _test_table(report_figures(load_evaluation(build)))
    table.caption = f"plots: {build.directory('evaluate') / PAGE}"
    return table


_STEPS: Final[Mapping[str, Callable[[Build], Table]]] = {
    "capture": _capture,
    "probe": _probe,
    "align": _align,
    "pair": _pair,
    "vectors": _vectors,
    "tune": _tune,
    "diagnose": _diagnose,
    "controls": _controls,
    "evaluate": _evaluate,
}


def _candidates_table(figures: Any) -> Table:
    # A manifest keeps no order.
    objective = "log_likelihood" if figures["objective"] == "likelihood" else "accuracy"
    names = sorted(figures["tune"]["candidates"].items(), key=lambda each: (-each[1][objective], each[0]))
    more = f"and {len(names) - _LONGEST} more" if len(names) > _LONGEST else None
    columns = ("vector", "accuracy", "log-likelihood", "strength", "perplexity", "retention", "held-out AUC")
    table = _table("Vectors on the tuning split", *columns, caption=more)
    for name, trial in names[:_LONGEST]:
        table.add_row(
            name,
            _number(trial["accuracy"]),
            _number(trial["log_likelihood"]),
            _number(trial["strength"], "g"),
            _ratio(trial["perplexity_ratio"]),
            _number(trial["retention"]),
            _number(figures["held_out_auc"].get(name)),
        )
    return table


def _test_table(figures: Any) -> Table:
    test = figures["test"]
    columns = ("steering", "accuracy", "95 % interval", "largest", "strength", "perplexity", "retention", "p (Holm)")
    table = _table(f"Test split, {test['questions']} questions", *columns)
    conditions = {name: each for name, each in test.items() if name != "questions"}
    for name in sorted(conditions, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        each = conditions[name]
        draws = "mean" in each
        value = each["mean"] if draws else each["accuracy"]
        low, high = each["mean_interval"] if draws else each["accuracy_interval"]
        table.add_row(
            f"{name}, mean of {each['count']}" if draws else name,
            _number(value),
            f"[{low:.3f}, {high:.3f}]",
            _number(each.get("maximum")),
            "same norm" if draws else _number(each["strength"], "g"),
            _ratio(each.get("perplexity_ratio")),
            _number(each.get("retention")),
            _number(figures["p_holm"].get(name), ".2g"),
        )
    return table


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0, overflow="fold")
    return table


def _number(value: float | None, spec: str = ".3f") -> str:
    return "-" if value is None else format(value, spec)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.3f}"


def _yes(value: object) -> str:
    return "yes" if value else "NO"
