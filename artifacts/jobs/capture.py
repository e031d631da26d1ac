"""Step 1: states of both models on the same texts, and the usual norm of the target's residual stream."""

from collections.abc import Sequence

from artifacts.jobs.build import Build
from artifacts.jobs.data import Question, Text, content
from artifacts.jobs.model import CausalModel, load_encoder
from artifacts.jobs.position import parse_position
from artifacts.jobs.residual import median_norms
from artifacts.jobs.shards import SHARD_BYTES, SHARD_ROWS, bytes_per_row, check_space
from artifacts.jobs.source import FoundModel
from artifacts.jobs.states import StateStore, capture_states, locate
from artifacts.jobs.tools import tool_versions
from artifacts.jobs.workdir import digest_of, file_digest, read_json, write_json

NAME = "capture"
NORMS = "norms.json"


def settings(build: Build) -> object:
    """What decides the states, apart from the code."""
    files = {name: path for name, path in build.data_files.items() if name in ("contrast", "mapping", "tune")}
    return {
        "expert": build.expert_source.digest(),
        "target": build.target_source.digest(),
        "data": {name: file_digest(path) for name, path in files.items()},
        # Which rows of the files are read for what is decided by other settings.
        "rows": {name: _rows_digest(rows) for name, rows in _texts(build).items()},
        # Later steps read labels and groups beside the states.
        "contrast_set": build.config.data.contrast_set,
        "layers": [build.expert_layers, build.target_layers],
        **_precision(build),
    }


def run(build: Build) -> None:
    """Capture what is missing; finished shards of an interrupted run are kept.

    Raises:
        BuildError: as `capture_states`; the rows and the room on the disk are checked before a model is loaded.
    """
    directory = build.directory(NAME)
    check_space(directory, states_bytes(build))
    check_rows(build)
    expert = build.load_expert()
    capture_model(build, expert, build.expert_source, build.expert_layers, "expert")
    del expert
    capture_model(build, build.target, build.target_source, build.target_layers, "target")
    answered = [build.target.answered_ids(row) for row in build.rows("tune", Question)]
    norms = median_norms(build.target, answered, build.target_layers, build.config.batch_tokens)
    write_json(directory / NORMS, {str(layer): norm for layer, norm in norms.items()})


def check_rows(build: Build) -> None:
    """Tokenise everything that the step will read, so that a row which a model cannot take is found in seconds.

    Raises:
        BuildError: as `locate` and `RowEncoder.encode_answered`; the row's file and line are named.
    """
    expert = load_encoder(build.config.expert.model, build.expert_source.directory)
    target = load_encoder(build.config.target.model, build.target_source.directory)
    for rows in _texts(build).values():
        for encoder in (expert, target):
            locate(encoder, rows, parse_position(build.config.data.position))
    for name in build.data_files.keys() & {"tune", "test", "retention"}:
        for question in build.rows(name, Question):
            target.encode_answered(question)


def states_bytes(build: Build) -> int:
    """Disk for the states of both models and of the untrained control: rows x layers x hidden size x bytes each."""
    return sum(
        models * len(rows) * bytes_per_row(len(layers), source.identity.hidden_size, build.config.capture.storage_dtype)
        for rows in _texts(build).values()
        for models, source, layers in (
            # The untrained control is as large as the expert.
            (2, build.expert_source, build.expert_layers),
            (1, build.target_source, build.target_layers),
        )
    )


def capture_model(
    build: Build, model: CausalModel, source: FoundModel, layers: Sequence[int], role: str, seed: int | None = None
) -> None:
    """Capture one model on the contrast and the mapping texts into stores named after its role."""
    for name, rows in _texts(build).items():
        digest = digest_of(
            {
                "model": source.digest(),
                "seed": seed,
                "rows": _rows_digest(rows),
                "layers": layers,
                "tools": tool_versions(),
                **_precision(build),
            }
        )
        capture_states(
            model,
            rows,
            layers,
            store(build, role, name).directory,
            digest,
            build.config.batch_tokens,
            f"capture {role} {name}",
            build.quiet,
            parse_position(build.config.data.position),
            build.config.capture.storage_dtype,
        )


def store(build: Build, role: str, name: str) -> StateStore:
    """States of the `expert` or the `target` on the `contrast` or `mapping` texts."""
    return StateStore(build.directory(NAME) / role / name)


def layer_norms(build: Build) -> dict[int, float]:
    """Median norm of the residual stream after each captured target layer."""
    return {int(layer): norm for layer, norm in read_json(build.directory(NAME) / NORMS).items()}


def _precision(build: Build) -> dict[str, object]:
    """Settings that change which numbers are read, or their last bits."""
    config = build.config
    return {
        "dtype": config.dtype,
        "device": config.device,
        "threads": config.threads,
        "batch_tokens": config.batch_tokens,
        "shard": [SHARD_ROWS, SHARD_BYTES],
        "position": config.data.position,
        "storage_dtype": config.capture.storage_dtype,
    }


def _texts(build: Build) -> dict[str, Sequence[Text]]:
    return {"contrast": build.contrast, "mapping": build.mapping}


def _rows_digest(rows: Sequence[Text]) -> str:
    return digest_of([content(row) for row in rows])
