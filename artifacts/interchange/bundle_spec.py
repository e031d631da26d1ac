"""A bundle described by hand: a YAML file with the fields of the manifest, which says where each tensor lies.

    name: calm
    target: ./my-8b                         # a model folder, or a mapping with the fields of `ModelIdentity`
    recommended_strength: 1.0
    maximum_strength: 2.0
    interventions:
      - {layer: 12, kind: project, read: directions.safetensors#anger}
      - {layer: 14, kind: clamp, read: axis.npy, parameters: {maximum: 3.5}}

`read` and `write` are FILE.npy or FILE.safetensors#TENSOR, of any float dtype, and become fp32. Paths start from the
YAML file.
"""

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from artifacts.errors import quoted
from artifacts.interchange.raw_vector import read_array, read_tensor
from artifacts.jobs.config import ModelSource
from artifacts.jobs.errors import BuildError
from artifacts.jobs.source import find_model
from artifacts.manifest import Manifest, parse_manifest

MAX_SPEC_BYTES = 1 << 20


class Packed(NamedTuple):
    """A manifest and exactly the runtime tensors that it names, fp32."""

    manifest: Manifest
    tensors: dict[str, Tensor]


def read_spec(path: Path) -> Packed:
    """Read a description with everything that it names.

    Raises:
        BuildError: the file, the model folder or a tensor cannot be read.
        BundleError: the fields make no valid manifest.
    """
    fields = _read_yaml(path)
    tensors: dict[str, Tensor] = {}
    steps = fields.get("interventions")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BuildError(f"{path}: interventions is {quoted(steps)}; a list of mappings is needed")
    listed: Counter[Any] = Counter()
    named = []
    for step in steps:
        layer = step.get("layer")
        if type(layer) is not int:
            raise BuildError(f"{path}: an intervention has layer {quoted(layer)}; the number of a block is needed")
        sources = {role: step[role] for role in ("read", "write") if step.get(role) is not None}
        names = {role: f"runtime.{layer}.{listed[layer]}.{role}" for role in sources}
        tensors.update({names[role]: _read_source(path.parent, source) for role, source in sources.items()})
        named.append(step | names)
        listed[layer] += 1
    fields = {"tool_versions": {"expertsteer": version("expertsteer")}, **fields, "interventions": named}
    if isinstance(fields.get("target"), str):
        fields["target"] = _identity(path.parent, fields["target"])
    try:
        text = json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BuildError(f"{path} holds what a manifest cannot: {error}; use texts, numbers and booleans") from None
    return Packed(parse_manifest(text), tensors)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SPEC_BYTES + 1)
        if len(data) > MAX_SPEC_BYTES:
            raise BuildError(f"{path} has more than {MAX_SPEC_BYTES} bytes; tensors belong into files of their own")
        content = yaml.safe_load(data.decode())
    except OSError as error:
        raise BuildError(f"cannot read {path} ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BuildError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise BuildError(f"{path} holds a {type(content).__name__}; a mapping of keys is needed")
    return content


def _read_source(folder: Path, source: object) -> Tensor:
    if not isinstance(source, str):
        raise BuildError(f"{quoted(source)} names no tensor; write FILE.npy or FILE.safetensors#TENSOR")
    file, separator, name = source.partition("#")
    if file.endswith(".npy") and not separator:
        return read_array(folder / file)
    if file.endswith(".safetensors") and name:
        return read_tensor(folder / file, name)
    raise BuildError(f"{quoted(source, 200)} names no tensor; write FILE.npy or FILE.safetensors#TENSOR")


def _identity(folder: Path, model: str) -> Mapping[str, Any]:
    directory = folder / model
    if not directory.is_dir():
        raise BuildError(f"there is no model folder {directory}; name a Hugging Face model folder, or give its fields")
    return find_model(ModelSource(model=str(directory.resolve())), Path()).identity.model_dump(mode="json")
