"""Records of the study on disk, one file per target and expert, so that an interrupted study goes on where it was."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from artifacts.lab.checkpoint import file_digest
from artifacts.lab.study.efficiency import RANDOM_DIRECTIONS, TargetRecord
from artifacts.lab.study.regime import REGIMES
from artifacts.lab.study.strength import HIGHEST_PERPLEXITY_RATIO, STRENGTHS

# Raise when the same models and settings give other figures than before.
SCHEMA: Final = 1

_RECORD: Final = TypeAdapter(TargetRecord)


def record_path(directory: Path, target: Path, expert: Path, draws: int) -> Path:
    """Where the record of two model directories lies; another name for other weights or settings."""
    settings = [
        SCHEMA,
        draws,
        RANDOM_DIRECTIONS,
        STRENGTHS,
        HIGHEST_PERPLEXITY_RATIO,
        [(regime.name, regime.wording, regime.counts, regime.flipped_share) for regime in REGIMES],
        [file_digest(model / name) for model in (target, expert) for name in ("model.safetensors", "tokenizer.json")],
    ]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return directory / f"record-{target.resolve().name}-{expert.resolve().name}-{digest[:12]}.json"


def save_record(path: Path, record: TargetRecord) -> None:
    """Write a record whole or not at all."""
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps(asdict(record), indent=1) + "\n")
    staged.replace(path)


def load_record(path: Path) -> TargetRecord | None:
    """The record at `path`, None if there is none or it is of another form."""
    try:
        return _RECORD.validate_json(path.read_bytes(), strict=True)
    except (FileNotFoundError, ValueError):
        return None
