"""A model as wide as Llama 8B and otherwise small, for figures that depend on the size of bundles, not on the model."""

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile

import torch
from shapes import LAB_MODEL
from torch.nn.functional import normalize

from artifacts.bundle import write_bundle
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope

HIDDEN_SIZE, NUM_LAYERS, MAX_PER_LAYER = 4096, 8, 8
ROW_BYTES = 4 * HIDDEN_SIZE
_ARCHITECTURE = "LlamaForCausalLM"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Enough to change the generated tokens.
_WRITE_NORM = 400.0


def wide_model(folder: Path) -> Path:
    """Write the model, with random weights and the lab's tokenizer, and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    lab = LlamaConfig.from_pretrained(LAB_MODEL)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=128,
        vocab_size=lab.vocab_size,
        max_position_embeddings=lab.max_position_embeddings,
        bos_token_id=lab.bos_token_id,
        eos_token_id=lab.eos_token_id,
        pad_token_id=lab.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        copyfile(LAB_MODEL / name, folder / name)
    return folder


def wide_bundle(path: Path, layers: Sequence[int], seed: int) -> Path:
    """Write a bundle that adds a random vector at each layer of a list; a layer may be there several times."""
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(len(layers), HIDDEN_SIZE, generator=generator)) * _WRITE_NORM
    names = [f"runtime.{layer}.{layers[:index].count(layer)}.write" for index, layer in enumerate(layers)]
    manifest = Manifest(
        name=path.stem,
        target=ModelIdentity(id="bench", architecture=_ARCHITECTURE, hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS),
        interventions=tuple(
            Intervention(layer=layer, kind="add", write=name) for layer, name in zip(layers, names, strict=True)
        ),
        recommended_strength=1.0,
        maximum_strength=4.0,
        scope=Scope.ALL,
    )
    write_bundle(path, manifest, dict(zip(names, rows, strict=True)))
    return path
