"""Layer numbers of GGUF control vectors, against a model that is steered as llama.cpp steers it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from artifacts.bundle import Bundle, load_bundle
from artifacts.interchange.vector_export import baked_vectors
from artifacts.interchange.vector_file import read_vectors, write_vectors
from artifacts.interchange.vector_import import ImportSettings, import_bundle
from artifacts.jobs.config import ModelSource
from artifacts.jobs.model import CausalModel, load_model
from artifacts.jobs.source import find_model

LAYERS = (1, 2, 4)
NUM_LAYERS, HIDDEN_SIZE = 5, 16
WriteGGUF = Callable[[Mapping[str, np.ndarray]], Path]
IDS = torch.arange(7, 15)[None]


@pytest.fixture(scope="module")
def directory(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", HIDDEN_SIZE, NUM_LAYERS)


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalModel:
    return load_model("tiny", directory, "float32", "cpu")


@pytest.fixture(scope="module")
def bundle(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("layers")
    generator = torch.Generator().manual_seed(5)
    rows = {layer: torch.randn(HIDDEN_SIZE, generator=generator) for layer in LAYERS}
    source = folder / "source.safetensors"
    target = find_model(ModelSource(model=str(directory)), Path()).identity
    write_vectors(source, rows, target)
    settings = ImportSettings("tiny", recommended=0.5, maximum=2.0)
    import_bundle(folder / "tiny.safetensors", source, read_vectors(source, ()), target, settings)
    return load_bundle(folder / "tiny.safetensors")


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Write a control vector with the `gguf` package alone."""

    def write(tensors: Mapping[str, np.ndarray]) -> Path:
        path = tmp_path / "theirs.gguf"
        writer = GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", len(tensors))
        for name, row in tensors.items():
            writer.add_tensor(name, row.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def llama_cpp_buffer(path: Path) -> np.ndarray:
    """What llama.cpp's loader makes of a file: rows for layers 1, 2, ... one after the other, zeros in the gaps."""
    rows: dict[int, np.ndarray] = {}
    for tensor in GGUFReader(path).tensors:
        number = int(tensor.name.split(".")[1])
        assert number >= 1
        rows[number] = np.array(tensor.data)
    buffer = np.zeros((max(rows), HIDDEN_SIZE), dtype=np.float32)
    for number, row in rows.items():
        buffer[number - 1] += row
    return buffer.reshape(-1)


@torch.inference_mode()
def llama_cpp(model: CausalModel, buffer: np.ndarray, shift: int = 0) -> list[Tensor]:
    """Run the graph block by block, each followed by `build_cvec(cur, il)`: block il >= 1 takes the row at offset
    n_embd * (il - 1) of the buffer. `shift` puts every row that many blocks further.

    Returns:
        The output of every block, and the logits.
    """
    backbone = model.network.model
    states = backbone.embed_tokens(IDS)
    rotary = backbone.rotary_emb(states, torch.arange(IDS.shape[1])[None])
    outputs = []
    for il, block in enumerate(backbone.layers):
        states = block(states, position_embeddings=rotary)
        source = il - shift
        offset = HIDDEN_SIZE * (source - 1)
        if source >= 1 and offset + HIDDEN_SIZE <= len(buffer):
            states = states + torch.from_numpy(buffer[offset : offset + HIDDEN_SIZE].copy())
        outputs.append(states)
    return [*outputs, model.network.lm_head(backbone.norm(states))]


@torch.inference_mode()
def transformers(model: CausalModel) -> list[Tensor]:
    """The same of the model as Transformers runs it."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for block in model.layers]
    try:
        logits = model.network(input_ids=IDS).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, logits]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(ours, theirs, strict=True))


def test_the_graph_of_the_tests_is_the_model(model: CausalModel) -> None:
    assert same(transformers(model), llama_cpp(model, np.zeros(0, dtype=np.float32)))


@pytest.mark.parametrize("strength", [0.5, 1.0, -1.5])
def test_llama_cpp_steers_the_block_that_the_bundle_steers(
    model: CausalModel, bundle: Bundle, tmp_path: Path, strength: float
) -> None:
    path = tmp_path / "tiny.gguf"
    write_vectors(path, baked_vectors(bundle, strength), bundle.manifest.target)
    unsteered = transformers(model)
    with model.steered({layer: strength * bundle.rows[f"runtime.{layer}.0.write"] for layer in LAYERS}):
        ours = transformers(model)
    assert same(ours, llama_cpp(model, llama_cpp_buffer(path)))
    for shift in (-1, 1):
        assert not same(ours, llama_cpp(model, llama_cpp_buffer(path), shift))
    # Block 0 is never steered, block 1 is.
    assert torch.equal(ours[0], unsteered[0])
    assert not torch.allclose(ours[1], unsteered[1], atol=1e-2)


def test_a_file_of_llama_cpp_steers_the_same_here(
    model: CausalModel, directory: Path, write_gguf: WriteGGUF, tmp_path: Path
) -> None:
    generator = np.random.default_rng(3)
    path = write_gguf({f"direction.{number}": generator.standard_normal(HIDDEN_SIZE) for number in (1, 3)})
    target = find_model(ModelSource(model=str(directory)), Path()).identity
    import_bundle(tmp_path / "b.safetensors", path, read_vectors(path, ()), target, ImportSettings("b"))
    bundle = load_bundle(tmp_path / "b.safetensors")
    assert [step.layer for step in bundle.manifest.interventions] == [1, 3]
    with model.steered({step.layer: bundle.rows[step.write] for step in bundle.manifest.interventions}):
        ours = transformers(model)
    assert same(ours, llama_cpp(model, llama_cpp_buffer(path)))
    for shift in (-1, 1):
        assert not same(ours, llama_cpp(model, llama_cpp_buffer(path), shift))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_direction_l_is_added_to_hidden_state_l_plus_one(model: CausalModel, write_gguf: WriteGGUF, layer: int) -> None:
    """repeng takes `direction.{l}` from `hidden_states[l + 1]`; that is what must move by the vector, and first."""
    vectors = read_vectors(write_gguf({f"direction.{layer}": np.full(HIDDEN_SIZE, 0.5)}), ()).vectors
    with torch.inference_mode():
        states = model.network(input_ids=IDS, output_hidden_states=True).hidden_states
    with model.steered(vectors):
        steered = transformers(model)
    torch.testing.assert_close(steered[layer] - states[layer + 1], torch.full((1, IDS.shape[1], HIDDEN_SIZE), 0.5))
    torch.testing.assert_close(steered[layer - 1], states[layer])
