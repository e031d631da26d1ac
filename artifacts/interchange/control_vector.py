"""Control vectors of llama.cpp and repeng: GGUF files of architecture `controlvector`.

**Numbering.** Tensor `direction.{l}` [hidden_size], F32, belongs to the 0-based decoder block l and is added to the
output of that block at every token. So it is in llama.cpp: `common_control_vector_load` puts direction.1 first into its
buffer, `llama_adapter_cvec::apply` copies the first row of the buffer to block il = 1, and every graph calls
`build_cvec(cur, il)` after the last residual sum of block il. repeng wraps block l and reads `hidden_states[l + 1]`,
the output of block l. Our layers are numbered alike, so that the map is the identity.

**Block 0** has no direction: llama.cpp refuses a file with `direction.0`.

**Other fields.** `controlvector.model_hint` is an architecture name for people (repeng: Transformers' `model_type`) and
`controlvector.layer_count` the number of directions. llama.cpp reads neither. There is no unit of strength.

llama.cpp's own `cvector-generator` measures direction.{l} on the output of block l - 1, one block before the one where
llama.cpp adds it. We follow where it is added, since that is what users of such a file have seen it do.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from artifacts.errors import quoted
from artifacts.interchange.gguf_header import MAX_HEADER_BYTES, check_gguf_header
from artifacts.interchange.whole_file import check_regular, written_whole
from artifacts.jobs.errors import BuildError

ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,8})")
_MAX_HINT = 128


class ControlVector(NamedTuple):
    """A control vector.

    Attributes:
        model_hint: architecture of the model it is for, as its author called it; may be empty.
        vectors: by 0-based decoder block, [hidden_size], fp32.
    """

    model_hint: str
    vectors: dict[int, Tensor]


def read_control_vector(path: Path) -> ControlVector:
    """Read a GGUF control vector. Values and sizes are not judged here: that needs a target model.

    Raises:
        BuildError: not a readable GGUF file, another architecture, or a tensor that llama.cpp would not take.
    """
    check_regular(path)
    reader = _open(path)
    try:
        architecture = _string(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise ValueError(f"its general.architecture is {quoted(architecture)}, not '{ARCHITECTURE}'")
        vectors: dict[int, Tensor] = {}
        for tensor in reader.tensors:
            match = _DIRECTION.fullmatch(tensor.name)
            if match is None or match[1] == "0":
                raise ValueError(
                    f"it holds a tensor {quoted(tensor.name)}, and llama.cpp takes direction.1 and up only"
                )
            if tensor.tensor_type != GGMLQuantizationType.F32:
                raise ValueError(f"{tensor.name} has type {tensor.tensor_type.name}, and llama.cpp takes F32 only")
            if tensor.data.size != tensor.data.shape[-1]:
                raise ValueError(f"{tensor.name} has shape {list(tensor.data.shape)}, and one dimension is needed")
            vectors[int(match[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float32).reshape(-1))
        if not vectors:
            raise ValueError("it holds no direction.{l} tensor")
        return ControlVector(_string(reader, f"{ARCHITECTURE}.model_hint")[:_MAX_HINT], dict(sorted(vectors.items())))
    except ValueError as error:
        raise BuildError(f"{quoted(str(path), 200)} is no control vector: {error}; export it again") from None


def write_control_vector(path: Path, vectors: Mapping[int, Tensor], model_hint: str) -> None:
    """Write a control vector that llama.cpp loads with `--control-vector` and repeng with `import_gguf`.

    Equal input gives equal bytes; the file appears whole or not at all.

    Args:
        path: where to write; an existing file is replaced.
        vectors: by 0-based decoder block, [hidden_size]; stored as fp32 in order of the blocks.
        model_hint: architecture name for people.

    Raises:
        BuildError: a vector for block 0, which llama.cpp cannot steer.
    """
    if 0 in vectors:
        raise BuildError(
            "llama.cpp cannot steer decoder block 0, and the bundle does; export .npy or .safetensors, "
            "or build it for the layers from 1 on"
        )
    with written_whole(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer in sorted(vectors):
            writer.add_tensor(f"direction.{layer}", vectors[layer].detach().cpu().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _open(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            check_gguf_header(file.read(MAX_HEADER_BYTES))
        with warnings.catch_warnings():
            # An offset that overflows is a warning to NumPy and damage here.
            warnings.simplefilter("error", RuntimeWarning)
            return GGUFReader(path)
    except OSError as error:
        raise BuildError(f"{quoted(str(path), 200)} cannot be read ({error.strerror}); check the path") from None
    # The package raises whatever its parser stumbles over: KeyError, IndexError, UnicodeDecodeError and others.
    except Exception as error:
        cause = quoted(" ".join(str(error).split()), 160)
        raise BuildError(
            f"{quoted(str(path), 200)} is damaged, cut off or no GGUF file: {cause}; copy or export it again"
        ) from error


def _string(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    value = field.contents() if field is not None else ""
    if not isinstance(value, str):
        raise ValueError(f"its {key} is no string")
    return value
