"""Step 1: states of both models on the same texts, and the usual norm of the target's residual stream."""

from collections.abc import Sequence

from artifacts.jobs.build import Build
from artifacts.jobs.data import Question, Text
from artifacts.jobs.model import CausalModel
from artifacts.jobs.source import FoundModel
from artifacts.jobs.states import SHARD_ROWS, StateStore, capture_states, median_norms
from artifacts.jobs.workdir import digest_of, file_digest, read_json, write_json

NAME = "capture"
NORMS = "norms.json"


def settings(build: Build) -> object:
    """What decides the states, apart from the code."""
    return {
        "expert": build.expert_source.digest(),
        "target": build.target_source.digest(),
        "data": {name: file_digest(build.data_path(name)) for name in ("contrast", "mapping", "tune")},
        "contrast_set": build.config.data.contrast_set,
        "layers": [build.expert_layers, build.target_layers],
        **_precision(build),
    }


def run(build: Build) -> None:
    """Capture what is missing; finished shards of an interrupted run are kept."""
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    expert = build.load_expert()
    capture_model(build, expert, build.expert_source, build.expert_layers, "expert")
    del expert
    capture_model(build, build.target, build.target_source, build.target_layers, "target")
    answered = [build.target.answered_ids(row) for row in build.rows("tune", Question)]
    norms = median_norms(build.target, answered, build.target_layers, build.config.batch_tokens)
    write_json(directory / NORMS, {str(layer): norm for layer, norm in norms.items()})


def capture_model(
    build: Build, model: CausalModel, source: FoundModel, layers: Sequence[int], role: str, seed: int | None = None
) -> None:
    """Capture one model on the contrast and the mapping texts into stores named after its role."""
    texts: dict[str, Sequence[Text]] = {"contrast": build.contrast, "mapping": build.mapping}
    for name, rows in texts.items():
        digest = digest_of(
            {
                "model": source.digest(),
                "seed": seed,
                "rows": [row.model_dump(include={"messages", "text"}) for row in rows],
                "layers": layers,
                **_precision(build),
            }
        )
        prompts = [model.prompt_ids(row) for row in rows]
        place = store(build, role, name).directory
        title = f"capture {role} {name}"
        capture_states(model, prompts, layers, place, digest, build.config.batch_tokens, title, build.quiet)


def store(build: Build, role: str, name: str) -> StateStore:
    """States of the `expert` or the `target` on the `contrast` or `mapping` texts."""
    return StateStore(build.directory(NAME) / role / name)


def layer_norms(build: Build) -> dict[int, float]:
    """Median norm of the residual stream after each captured target layer."""
    return {int(layer): norm for layer, norm in read_json(build.directory(NAME) / NORMS).items()}


def _precision(build: Build) -> dict[str, object]:
    """Settings that change the last bits of a state."""
    config = build.config
    return {
        "dtype": config.dtype,
        "device": config.device,
        "threads": config.threads,
        "batch_tokens": config.batch_tokens,
        "shard_rows": SHARD_ROWS,
    }
