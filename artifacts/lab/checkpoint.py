"""A trained lab model as a directory that Transformers and vLLM load, with the settings that made it in `lab.json`."""

import hashlib
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from artifacts.lab.recipe import Recipe
from artifacts.lab.training import Trained

SHIPPED_MODELS: Final = Path(__file__).parent / "models"
RECORD: Final = "lab.json"

_DIGESTED = ("model.safetensors", "tokenizer.json")
_RECORDED_PACKAGES = ("torch", "transformers", "tokenizers")


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def is_checkpoint(directory: Path) -> bool:
    """Whether `directory` is a model that `save_checkpoint` wrote."""
    return (directory / RECORD).is_file()


def check_replaceable(directory: Path) -> None:
    """Raise FileExistsError if `directory` exists and is not an earlier lab model, which may be written over."""
    if directory.exists() and not is_checkpoint(directory):
        raise FileExistsError(f"{directory} exists and is no lab model (it has no {RECORD}); choose another --out")


def save_checkpoint(directory: Path, recipe: Recipe, trained: Trained) -> None:
    """Write `directory` in one go: an earlier lab model there stays whole until the new one is complete.

    FileExistsError as in `check_replaceable`, OSError when the directory cannot be written.
    """
    check_replaceable(directory)
    staged = directory.with_name(f".{directory.name}.new")
    replaced = directory.with_name(f".{directory.name}.old")
    for leftover in (staged, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=True)
    trained.model.save_pretrained(staged)
    trained.tokenizer.save_pretrained(staged)
    (staged / RECORD).write_text(json.dumps(_record(staged, recipe, trained), indent=2) + "\n")
    if directory.exists():
        directory.rename(replaced)
    staged.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _record(directory: Path, recipe: Recipe, trained: Trained) -> dict[str, object]:
    return {
        "recipe": asdict(recipe),
        "parameters": trained.model.num_parameters(),
        "tokens": trained.num_tokens,
        "final_loss": round(trained.final_loss, 6),
        "versions": {package: version(package) for package in _RECORDED_PACKAGES},
        # The bytes of the weights also depend on the vector instructions that torch picked.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "digests": {name: file_digest(directory / name) for name in _DIGESTED},
    }
