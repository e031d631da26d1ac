"""Tiny random models and data files for the offline jobs, and profiles that come from no file."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from one_process import Engine, Node
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from artifacts.bundle import Bundle, write_bundle
from artifacts.lab import training
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope
from server.auth.keys import KeyRing
from server.metrics.metrics import SteeringMetrics
from server.pins import Pins
from server.profiles import Profile, ProfileTable, recommended_settings
from server.service import SteeringService

NUMBERS = [str(number) for number in range(12)]
NAMES = ["plus", "is", "what", "be", "careful", "careless", "the", "old", "man", "sold", "a", "lamp", "."]
WORDS = [*NUMBERS, *NAMES]
SPECIAL = ["<bos>", "<pad>", "<end>", "<system>", "<user>", "<assistant>", "<unk>"]
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _network(kind: str, hidden_size: int, num_layers: int) -> Any:
    sizes: dict[str, Any] = {"vocab_size": len(WORDS) + len(SPECIAL), "bos_token_id": 0, "pad_token_id": 1}
    sizes |= {"eos_token_id": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=hidden_size, n_layer=num_layers, n_head=2, n_positions=64, **sizes))
    sizes |= {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "intermediate_size": 2 * hidden_size}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads are slower than one on models as small as the lab's."""
    with training.one_thread():
        yield


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny model with random weights and return its directory."""

    def make(kind: str, hidden_size: int, num_layers: int, chat: bool = True) -> Path:
        directory = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hidden_size)
            _network(kind, hidden_size, num_layers).save_pretrained(directory)
        vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(SPECIAL)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<bos>",
            pad_token="<pad>",
            eos_token="<end>",
            chat_template=TEMPLATE if chat else None,
        ).save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_target(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", 32, 3)


@pytest.fixture(scope="session")
def tiny_expert(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen2", 48, 2)


@dataclass(frozen=True)
class TinyBuild:
    """A configuration file in its own directory; `change` rewrites keys of it."""

    config: Path

    def change(self, **keys: object) -> None:
        content = yaml.safe_load(self.config.read_text())
        self.config.write_text(yaml.safe_dump(content | keys))


@pytest.fixture
def tiny_build(tmp_path: Path, tiny_target: Path, tiny_expert: Path) -> TinyBuild:
    """A build of two random models, small enough for a second."""
    pairs = [(x, y) for x in range(6) for y in range(6)]
    system = {1: "be careful", 0: "be careless"}

    def chat(x: int, y: int, *before: dict[str, str]) -> list[dict[str, str]]:
        return [*before, {"role": "user", "content": f"what is {x} plus {y}"}]

    rows: dict[str, list[dict[str, object]]] = {"contrast": [], "mapping": [], "tune": [], "test": [], "neutral": []}
    for x, y in pairs:
        for label, text in system.items():
            messages = chat(x, y, {"role": "system", "content": text})
            rows["contrast"].append({"messages": messages, "label": label, "group": f"{x}+{y}"})
        rows["mapping"].append({"messages": chat(x, y), "group": f"{x}+{y}"})
        rows["mapping"].append({"text": f"the old man sold {x} lamp . {y}", "group": f"{x}-{y}"})
    for name, summand in (("tune", 7), ("test", 8)):
        answers = [(chat(summand, y), f"{summand} plus {y} is {y} .", f"{summand}+{y}") for y in range(5)]
        rows[name] += [{"messages": chat, "answer": answer, "group": group} for chat, answer, group in answers]
        rows["neutral"] += [{"text": f"the old man is {y} . a lamp", "split": name} for y in range(3)]
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "name": "tiny",
        "target": {"model": str(tiny_target), "id": "tiny-target"},
        "expert": {"model": str(tiny_expert), "id": "tiny-expert"},
        "data": {name: f"{name}.jsonl" for name in rows},
        "align": {"permutations": 20},
        "pairing": {"shortlist": 2, "strengths": [0.1], "components": 4, "permutations": 20},
        "tune": {"strengths": [0.05, 0.1], "perplexity_budget": 10.0, "minimum_gain": -1.0},
        # Random weights hold no concept, so its direction may have no sign of its own.
        "vectors": {"methods": ["diffmean", "rfm"], "sign": 1, "components": 32, "iterations": 2},
        "threads": 1,
        "device": "cpu",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return TinyBuild(path)


@pytest.fixture(scope="session")
def tiny_bundle() -> Callable[..., Bundle]:
    """Bundle in memory: hidden size 4, row i of the bundle filled with i + 1, a digest of its name."""

    def make(name: str, layers: tuple[int, ...] = (1,), maximum: float = 2.0, scope: Scope = Scope.ALL) -> Bundle:
        writes = [f"runtime.{layer}.{layers[:index].count(layer)}.write" for index, layer in enumerate(layers)]
        manifest = Manifest(
            name=name,
            description=f"About {name}.",
            target=ModelIdentity(id="tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6),
            interventions=tuple(
                Intervention(layer=layer, kind="add", write=write) for layer, write in zip(layers, writes, strict=True)
            ),
            recommended_strength=0.5,
            maximum_strength=maximum,
            scope=scope,
        )
        tensors = {write: torch.full((4,), float(index + 1)) for index, write in enumerate(writes)}
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        return Bundle(digest, manifest, 100, tensors)

    return make


@pytest.fixture(scope="session")
def profile_of() -> Callable[..., Profile]:
    """Profile of a bundle as the bundle recommends; keyword arguments change its settings."""

    def make(bundle: Bundle, name: str | None = None, **changes: Any) -> Profile:
        settings = replace(recommended_settings(bundle.digest, bundle.manifest), **changes)
        return Profile(name or bundle.manifest.name, bundle.manifest, settings)

    return make


@pytest.fixture(scope="session")
def make_profile(tiny_bundle: Callable[..., Bundle], profile_of: Callable[..., Profile]) -> Callable[..., Profile]:
    """Profile of a `tiny_bundle`."""
    return lambda *args, **kwargs: profile_of(tiny_bundle(*args, **kwargs))


@pytest.fixture(scope="session")
def table_of() -> Callable[..., ProfileTable]:
    """Table of profiles, each in one version."""
    return lambda *profiles: ProfileTable({profile.name: [profile] for profile in profiles})


@pytest.fixture
def make_service() -> Callable[..., SteeringService]:
    """Service with a table of profiles, an engine, and parts that only count; without a registry."""

    def make(table: ProfileTable, engine: Any = None, model_names: tuple[str, ...] = ("lab",)) -> SteeringService:
        no_registry: Any = None
        reconciler: Any = SimpleNamespace(table=table, state="ready")
        return SteeringService(
            model_names=model_names,
            instance="test",
            build={},
            bytes_per_row=0,
            engine=engine,
            registry=no_registry,
            reconciler=reconciler,
            bundle_operations=no_registry,
            profile_operations=no_registry,
            pins=Pins(),
            metrics=SteeringMetrics(),
            audit=no_registry,
            keys=KeyRing(),
        )

    return make


@pytest.fixture
def start_process(tmp_path: Path) -> Callable[..., Any]:
    """Start a `Node` on this test's registry; an asynchronous context manager."""

    @asynccontextmanager
    async def run(
        instance: str = "a",
        engine: Engine | None = None,
        spans: tuple[str, ...] = (),
        root: Path | None = None,
    ) -> AsyncIterator[Node]:
        lock = tmp_path / f"{instance}.lock"
        node = Node(tmp_path / "registry", lock, instance, engine or Engine(), spans, root)
        try:
            await node.reconciler.start()
            yield node
        finally:
            await node.reconciler.stop()
            node.registry.close()

    return run


@pytest.fixture
def bundle_file(tmp_path: Path, tiny_bundle: Callable[..., Bundle]) -> Callable[..., Path]:
    """Write a tiny bundle: `bundle_file(name, *layers, **changes of the manifest)`."""

    def make(name: str, *layers: int, **changes: Any) -> Path:
        bundle = tiny_bundle(name, layers or (1,))
        path = tmp_path / f"{name}.safetensors"
        write_bundle(path, bundle.manifest.model_copy(update=changes), bundle.rows)
        return path

    return make
