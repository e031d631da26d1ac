"""Files of vectors by their ending: .gguf, .npy, .safetensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from artifacts.errors import quoted
from artifacts.interchange.control_vector import read_control_vector, write_control_vector
from artifacts.interchange.raw_vector import read_npy, read_safetensors, write_npy, write_safetensors
from artifacts.jobs.errors import BuildError
from artifacts.manifest import ModelIdentity

FORMATS = {".gguf": "gguf", ".npy": "npy", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class VectorFile:
    """Vectors as they lie in a file.

    Attributes:
        format: gguf, npy or safetensors.
        vectors: by 0-based decoder block, [hidden_size], fp32.
        num_rows: number of layers that the file speaks of, where it does.
        model_hint: architecture name in the file, or empty.
    """

    format: str
    vectors: dict[int, Tensor]
    num_rows: int | None = None
    model_hint: str = ""


def format_of(path: Path) -> str:
    """Return the format that the ending of a path names.

    Raises:
        BuildError: another ending.
    """
    if path.suffix not in FORMATS:
        raise BuildError(f"{quoted(str(path), 200)} ends in {quoted(path.suffix)}; {', '.join(FORMATS)} are known")
    return FORMATS[path.suffix]


def read_vectors(path: Path, layers: Sequence[int]) -> VectorFile:
    """Read a file of vectors.

    Args:
        path: of the file; its ending tells the format.
        layers: where a single vector acts (one layer); else the blocks to take from the file, all when empty.

    Raises:
        BuildError: not readable as that format, or without one of the layers.
    """
    kind = format_of(path)
    if kind == "gguf":
        hint, vectors = read_control_vector(path)
        file = VectorFile(kind, vectors, model_hint=hint)
    else:
        single = layers[0] if len(layers) == 1 else None
        raw = read_npy(path, single) if kind == "npy" else read_safetensors(path, single)
        file = VectorFile(kind, raw.vectors, raw.num_rows)
    missing = [layer for layer in layers if layer not in file.vectors]
    if missing or not file.vectors:
        held = ", ".join(map(str, file.vectors)) or "none"
        asked = f"layer {missing[0]} is asked for" if missing else "one at least is needed"
        raise BuildError(f"{quoted(str(path), 200)} holds vectors of layers {held[:200]}, and {asked}; check --layer")
    taken = {layer: file.vectors[layer] for layer in sorted(set(layers)) or file.vectors}
    return VectorFile(file.format, taken, file.num_rows, file.model_hint)


def write_vectors(path: Path, vectors: Mapping[int, Tensor], target: ModelIdentity) -> None:
    """Write vectors in the format that the ending of `path` names.

    Args:
        path: where to write; an existing file is replaced.
        vectors: by 0-based decoder block, [hidden_size].
        target: the model they are for.

    Raises:
        BuildError: another ending, or a vector that the format cannot hold.
    """
    kind = format_of(path)
    if kind == "gguf":
        # Nobody acts on the hint; repeng writes Transformers' model_type, which for most classes is this.
        write_control_vector(path, vectors, target.architecture.removesuffix("ForCausalLM").lower())
    elif kind == "npy":
        write_npy(path, vectors, target.num_layers)
    else:
        write_safetensors(path, vectors)
