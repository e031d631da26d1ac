"""The figures of a build as the manifest keeps them: plain JSON, six digits."""

from typing import Any

from pydantic import JsonValue, TypeAdapter

from artifacts.jobs.build import Build
from artifacts.jobs.controls import load_controls
from artifacts.jobs.diagnose import Diagnosis, load_diagnoses
from artifacts.jobs.direction import RFM_PARTS
from artifacts.jobs.evaluate import load_evaluation, report_figures
from artifacts.jobs.matrix import layer_matrix, rounded
from artifacts.jobs.probe import Probed, load_probed
from artifacts.jobs.splits import Overlap, overlap
from artifacts.jobs.tune import Tuned
from artifacts.jobs.vectors import load_directions

# Suspected labels in the manifest; the work directory has all of them.
MAX_SUSPECTS = 50


def evaluation_figures(build: Build, tuned: Tuned) -> dict[str, JsonValue]:
    """The manifest's `evaluation`: every step's figures, so that the bundle alone tells how it came about."""
    directions, controls = load_directions(build), load_controls(build)[0]
    splits = overlap(build)
    probed = load_probed(build)
    figures: dict[str, Any] = {
        "preset": build.config.preset,
        "align": build.config.align.method,
        "pairing": build.config.pairing.method,
        "objective": build.config.tune.objective,
        "position": build.config.data.position,
        "prompt": build.config.evaluate.prompt,
        **report_figures(load_evaluation(build)),
        "tune": {
            "off": tuned.unsteered.accuracy,
            "recommended": tuned.recommended._asdict(),
            "trials": [trial._asdict() for trial in tuned.trials],
            "candidates": {each.key: each.best._asdict() for each in tuned.candidates},
        },
        "controls": {name: {"strength": strength} for name, strength in controls.strengths.items()},
        "controls_missing": controls.missing,
        "pairs": layer_matrix(build),
        "probe": _plain(Probed, probed)["layers"],
        "suspects": _plain(Probed, probed)["suspects"][:MAX_SUSPECTS],
        "stability": _plain(tuple[Diagnosis, ...], load_diagnoses(build)),
        "held_out_auc": directions.auc,
        "refused": directions.refused,
        "vectors": [each.key for each in tuned.chosen],
        "rfm_back_map": back_map(tuned),
        "aligner_and_direction_disjoint": build.prompts_differ,
        "splits_disjoint": splits.disjoint,
        "overlap": _plain(Overlap, splits),
    }
    plain: dict[str, JsonValue] = rounded(figures)
    return plain


def back_map(tuned: Tuned) -> str:
    """The better way back from the RFM's whitened space, by the tuning split."""
    for candidate in tuned.candidates:
        for part in RFM_PARTS:
            if candidate.kind.startswith("rfm") and candidate.kind.endswith(part):
                return part
    # Nothing of the RFM competed: the way that the states themselves move.
    return "displacement"


def _plain(kind: Any, value: object) -> Any:
    return TypeAdapter(kind).dump_python(value, mode="json")
