"""The table at the end of a build."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from artifacts.bundle import Bundle


def print_report(bundle: Bundle, path: Path, console: Console | None = None) -> None:
    """Print what the bundle is and how it did, from its own manifest."""
    out = console or Console()
    manifest = bundle.manifest
    figures: Any = manifest.evaluation
    out.print(_pairs_table(figures))
    out.print(_vectors_table(figures))
    out.print(_separation_table(figures["held_out_auc"]))
    out.print(_test_table(figures))
    chosen = ", ".join(f"expert {pair.expert} -> target {pair.target}" for pair in manifest.layer_pairs)
    out.print(f"chosen: {', '.join(figures['vectors'])} (layers {chosen})")
    out.print(
        f"recommended strength {manifest.recommended_strength:g}, maximum {manifest.maximum_strength:g} "
        "(in median norms of the layer)"
    )
    out.print(f"aligner texts and direction texts disjoint: {_yes(figures['aligner_and_direction_disjoint'])}")
    out.print(f"fit, tuning and test splits disjoint: {_yes(figures['splits_disjoint'])}")
    out.print(f"{path}  {bundle.num_bytes / 1e6:.2f} MB  {bundle.digest}", soft_wrap=True)


def _pairs_table(figures: Any) -> Table:
    table = _table("Layer pairs", "expert", "target", "R²", "permuted 95 %", "gain", "strength", "perplexity")
    for pair in figures["pairs"]:
        table.add_row(
            str(pair["expert"]),
            str(pair["target"]),
            _number(pair["r2"]),
            _number(pair["r2_permuted_95"]),
            _number(pair.get("held_out"), "+.3f"),
            _number(pair.get("held_out_strength"), "g"),
            _ratio(pair.get("held_out_perplexity_ratio")),
        )
    return table


def _vectors_table(figures: Any) -> Table:
    table = _table("Vectors on the tuning split", "vector", "accuracy", "strength", "perplexity", "held-out AUC")
    candidates = figures["tune"]["candidates"].items()
    for name, trial in sorted(candidates, key=lambda each: (-each[1]["accuracy"], each[1]["perplexity_ratio"])):
        table.add_row(name, *_trial(trial), _number(figures["held_out_auc"].get(name)))
    for name, reason in figures["refused"].items():
        table.add_row(name, "refused", "", "", reason)
    return table


def _separation_table(auc: Any) -> Table:
    """Area under the curve of each method in the expert's own space."""
    kinds = {"diffmean": "diffmean.{}", "rfm covector": "rfm.{}.covector", "rfm displacement": "rfm.{}.displacement"}
    table = _table("Held-out AUC in the expert's space", "expert layer", *kinds)
    for layer in sorted(
        int(name.split(".")[1]) for name in auc if name.startswith("diffmean.") and name.count(".") == 1
    ):
        table.add_row(str(layer), *(_number(auc.get(name.format(layer))) for name in kinds.values()))
    return table


def _test_table(figures: Any) -> Table:
    test = figures["test"]
    table = _table(f"Test split, {test['questions']} questions", "steering", "accuracy", "strength", "perplexity")
    table.add_row("off", _number(test["off"]), "0", "x1.000")
    table.add_row("on", *_trial(test["on"]))
    table.add_row("negated", *_trial(test["negated"]))
    random = test["random"]
    table.add_row(f"random, mean of {random['count']}", _number(random["mean"]), "same norm", "")
    table.add_row(f"random, best of {random['count']}", _number(random["maximum"]), "same norm", "")
    controls = {"own_difference_of_means": "target's own difference of means", "untrained_expert": "untrained expert"}
    for key, title in controls.items():
        if test[key] is not None:
            table.add_row(title, *_trial(test[key]))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0, overflow="fold")
    return table


def _trial(trial: Any) -> tuple[str, str, str]:
    return _number(trial["accuracy"]), _number(trial["strength"], "g"), _ratio(trial["perplexity_ratio"])


def _number(value: float | None, spec: str = ".3f") -> str:
    return "-" if value is None else format(value, spec)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.3f}"


def _yes(value: object) -> str:
    return "yes" if value else "NO"
