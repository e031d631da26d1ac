"""Step 8: directions that a figure is worth nothing without, made like the bundle's own but for one ingredient.

* `own`: the target's own difference of means, its layer and strength tuned: what could be had without an expert.
* `untrained`: the same way with an untrained expert of the same shape, its layers and strength tuned, the kind of
  vector as the bundle chose it; where it does as well, the mapping texts carry the concept and the expert adds nothing.
* `permuted-labels-{k}`, `shuffled-pairs-{k}`, `autoencoder-{k}`: chance in the labels, in the pairs of the aligner, and
  in the initialisation of an auto-encoder, at the bundle's own strength, as random directions are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import capture_model, layer_norms
from artifacts.jobs.direction import BY_NAME, Chance, DirectionFitter
from artifacts.jobs.pair import shortlist
from artifacts.jobs.progress import progress
from artifacts.jobs.trials import best_rows
from artifacts.jobs.tune import Tuned, load_tuned
from artifacts.jobs.workdir import read_tensors, read_value, write_tensors, write_value

NAME = "controls"
ROWS = "rows.safetensors"
RESULT = "result.json"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Controls:
    """Strength of every control, and the reason for each that could not be made."""

    strengths: dict[str, float]
    missing: dict[str, str]


def settings(build: Build) -> object:
    """What decides the controls, apart from the tuned vectors."""
    return {"draws": build.config.evaluate.control_draws, "seed": build.config.seed}


def run(build: Build) -> None:
    """Make every control and tune the strength of those that stand on their own."""
    directory = build.directory(NAME)
    tuned = load_tuned(build)
    rows: dict[str, Tensor] = {}
    controls = Controls({}, {})
    reasons: list[str] = []
    for name, made in (("own", _own(build, tuned)), (UNTRAINED, _untrained(build, tuned, reasons))):
        _keep_tuned(build, name, made, reasons, rows, controls)
    refused: dict[str, list[str]] = {}
    for name, chance in progress(list(_chances(build)), "chance controls", build.quiet):
        try:
            drawn = _repeated(build, tuned, chance)
        except ValueError as error:
            refused.setdefault(name.rpartition("-")[0], []).append(str(error))
            continue
        rows |= _named(name, drawn)
        controls.strengths[name] = tuned.recommended.strength
    for name, reasons in refused.items():
        count = build.config.evaluate.control_draws
        controls.missing[name] = f"{len(reasons)} of {count} draws were refused, the first: {reasons[0]}"
    write_tensors(directory / ROWS, rows)
    write_value(directory / RESULT, Controls, controls)


def load_controls(build: Build) -> tuple[Controls, dict[str, Tensor]]:
    """The controls and their rows by `{name}.{layer}`: what one unit of strength adds after a layer."""
    directory = build.directory(NAME)
    return read_value(directory / RESULT, Controls), read_tensors(directory / ROWS)


def control_rows(tensors: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """Rows of one control by layer."""
    split = {key: key.rpartition(".") for key in tensors}
    return {int(layer): tensors[key] for key, (owner, _, layer) in split.items() if owner == name}


def _chances(build: Build) -> Iterator[tuple[str, Chance]]:
    method, seed = build.config.align.method, build.config.seed
    for draw in range(build.config.evaluate.control_draws):
        yield f"permuted-labels-{draw}", Chance(labels=seed + 1 + draw)
        # The paper's auto-encoder sees no pairs, so there is nothing to shuffle; its initialisation is the chance.
        if method == "autoencoder":
            yield f"autoencoder-{draw}", Chance(aligner=seed + 1 + draw)
        else:
            yield f"shuffled-pairs-{draw}", Chance(pairs=seed + 1 + draw)


def _repeated(build: Build, tuned: Tuned, chance: Chance) -> dict[int, Tensor]:
    """The chosen directions again under one kind of chance, at their layers' norms."""
    fitter, norms = DirectionFitter(build, chance), layer_norms(build)
    return {
        each.target: fitter.direction(BY_NAME[each.kind], each.expert, each.target) * norms[each.target]
        for each in tuned.chosen
    }


def _own(build: Build, tuned: Tuned) -> list[dict[int, Tensor]]:
    """One candidate per target layer, as the bundle had them; with several pairs, the bundle's own layers."""
    fitter, norms = DirectionFitter(build), layer_norms(build)
    if len(tuned.chosen) > 1:
        return [{each.target: fitter.own(each.target) * norms[each.target] for each in tuned.chosen}]
    return [{target: fitter.own(target) * norms[target]} for target in build.target_layers]


def _untrained(build: Build, tuned: Tuned, reasons: list[str]) -> list[dict[int, Tensor]]:
    """From every layer of an untrained expert to the target layers of the shortlist, by the chosen kind of vector."""
    # A labeller has one expert layer of its own choice.
    layers = build.expert_layers if build.config.align.method != "labeller" else build.expert_layers[:1]
    seed = build.config.seed
    model = build.load_expert(random_seed=seed)
    capture_model(build, model, build.expert_source, build.expert_layers, UNTRAINED, seed)
    del model
    fitter, norms = DirectionFitter(build, Chance(role=UNTRAINED)), layer_norms(build)
    if len(tuned.chosen) > 1:
        targets = [{each.target: each.kind for each in tuned.chosen}]
    else:
        targets = [{target: tuned.chosen[0].kind} for target in sorted({pair[1] for pair in shortlist(build)})]
    made = []
    for layer, wanted in progress([(layer, each) for layer in layers for each in targets], "untrained", build.quiet):
        try:
            made.append({to: fitter.direction(BY_NAME[kind], layer, to) * norms[to] for to, kind in wanted.items()})
        except ValueError as error:
            reasons.append(f"expert layer {layer}: {error}")
    return made


def _keep_tuned(
    build: Build,
    name: str,
    made: list[dict[int, Tensor]],
    reasons: list[str],
    rows: dict[str, Tensor],
    controls: Controls,
) -> None:
    """Keep the best of several at its best strength on the tuning split."""
    if not made:
        controls.missing[name] = f"no direction could be made: {reasons[0]}"
        return
    best = best_rows(build, made)
    if best is None:
        controls.missing[name] = "no strength keeps within the budgets"
        return
    rows |= _named(name, best[0])
    controls.strengths[name] = best[1].strength


def _named(name: str, rows: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{layer}": row for layer, row in rows.items()}
