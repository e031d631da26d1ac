"""Does a bundle belong to the model that is served?"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.bundle import Bundle
from artifacts.errors import BundleError, BundleErrorCode, quoted
from artifacts.header import read_header

FINGERPRINT_BYTES = 4096
MAX_CONFIG_BYTES = 16 << 20
# The limit of the safetensors library; models of many experts have headers well over a bundle's limit.
MAX_WEIGHTS_HEADER_BYTES = 100_000_000
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class ServedModel:
    """The model that bundles are held against. `fingerprint` is None when it has no safetensors weights."""

    id: str
    architecture: str
    hidden_size: int
    num_layers: int
    fingerprint: str | None


def weights_fingerprint(model_dir: Path) -> str | None:
    """Return "sha256:<hex>" over a sample of every tensor, or None when the folder has no `*.safetensors`.

    One line per tensor, sorted: the JSON of [name, dtype, shape, hex SHA-256 of the first 4 KiB]. File names do not
    enter, so the same weights in one file or in shards have the same fingerprint. Reads headers and 4 KiB per tensor.

    Raises:
        BundleError: a weights file is damaged or cannot be read.
    """
    paths = sorted(model_dir.glob("*.safetensors"))
    lines = sorted(line for path in paths for line in _sample(path))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}" if paths else None


def served_model(model_dir: Path) -> ServedModel:
    """Describe the model in a Hugging Face model folder, from its config.json and its weights.

    Raises:
        BundleError: code BAD_MODEL; no readable config.json, or one without architecture, width or depth.
    """
    config = _read_config(model_dir)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _bad_model(model_dir, f"config.json has architectures {quoted(architectures)}, not a class name")
    text = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    hidden_size, num_layers = _size(text, _WIDTH_KEYS), _size(text, _DEPTH_KEYS)
    if hidden_size is None or num_layers is None:
        keys = " or ".join((*_WIDTH_KEYS, *_DEPTH_KEYS))
        raise _bad_model(model_dir, f"config.json gives hidden size {hidden_size} and depth {num_layers} ({keys})")
    return ServedModel(str(model_dir), architectures[0], hidden_size, num_layers, weights_fingerprint(model_dir))


def check_target(bundle: Bundle, served: ServedModel) -> None:
    """Refuse a bundle that was built for another model than `served`.

    Compares architecture, hidden size, number of layers and, where the manifest has one, the weights' fingerprint.

    Raises:
        BundleError: code MODEL_MISMATCH, naming both values.
    """
    target = bundle.manifest.target
    for what, wanted, found in (
        ("architecture", target.architecture, served.architecture),
        ("hidden size", target.hidden_size, served.hidden_size),
        ("number of layers", target.num_layers, served.num_layers),
        ("weights fingerprint", target.fingerprint, served.fingerprint),
    ):
        if wanted is not None and wanted != found:
            raise BundleError(
                BundleErrorCode.MODEL_MISMATCH,
                f"Bundle {quoted(bundle.manifest.name)} was built for {quoted(target.id)} with {what} "
                f"{quoted(wanted)} and {quoted(served.id)} has {quoted(found)}; "
                "serve that model, or build a bundle for this one.",
            )


def _sample(path: Path) -> list[str]:
    """Return the fingerprint lines of one weights file."""
    lines = []
    try:
        with open(path, "rb") as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, MAX_WEIGHTS_HEADER_BYTES)
            for entry in header.tensors:
                file.seek(header.data_start + entry.begin)
                start = hashlib.sha256(file.read(min(entry.num_bytes, FINGERPRINT_BYTES))).hexdigest()
                lines.append(json.dumps([entry.name, entry.dtype, list(entry.shape), start]) + "\n")
    except BundleError as error:
        raise BundleError(error.code, f"{quoted(path.name)} in {quoted(str(path.parent), 200)}: {error}") from None
    except OSError as error:
        raise _bad_model(path.parent, f"{path.name} cannot be read ({error.strerror})") from None
    return lines


def _bad_model(model_dir: Path, what: str) -> BundleError:
    return BundleError(
        BundleErrorCode.BAD_MODEL,
        f"{quoted(str(model_dir), 200)} is no usable model folder: {what}; name a Hugging Face model folder.",
    )


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))  # lenient: real ones hold Infinity
    except OSError as error:
        raise _bad_model(model_dir, f"config.json cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise _bad_model(model_dir, f"config.json is not valid JSON ({quoted(str(error), 120)})") from None
    if not isinstance(config, dict):
        raise _bad_model(model_dir, "config.json is not a JSON object")
    return config


def _size(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)
