"""Which norms may take over a layer's steering, read off sources made by hand and off vLLM's own models."""

import json
import subprocess
import sys

import pytest
from torch import nn

from server.engine.fusion import forward_of, norms_after, reduces_itself

TIMEOUT_S = 180
# A process of its own, because importing vLLM's models changes the one that does it.
DRIVER = """
import importlib, json, sys
from server.engine import fusion

found = {}
for name, layer, model in json.loads(sys.argv[1]):
    module = importlib.import_module(f"vllm.model_executor.models.{name}")
    of_layer, of_model = (fusion.forward_of(object.__new__(getattr(module, cls))) for cls in (layer, model))
    found[name] = [
        fusion._passes_stream_on(of_model), fusion._returns_stream(of_layer), fusion._first_norm(of_layer),
        fusion._last_norm(of_model), fusion.adds_residual(of_layer),
    ]
print(json.dumps(found))
"""
FUSED = [True, True, "input_layernorm", "norm", True]


def test_models_of_vllm(vllm_environment: dict[str, str]) -> None:
    models = [
        ("llama", "LlamaDecoderLayer", "LlamaModel"),
        ("qwen2", "Qwen2DecoderLayer", "Qwen2Model"),
        ("gemma2", "Gemma2DecoderLayer", "Gemma2Model"),
        ("mixtral", "MixtralDecoderLayer", "MixtralModel"),
        ("mistral", "MistralDecoderLayer", "MistralModel"),
        ("stablelm", "StablelmDecoderLayer", "StableLMEpochModel"),
        ("gpt2", "GPT2Block", "GPT2Model"),
        ("phimoe", "PhiMoEDecoderLayer", "PhiMoEModel"),
    ]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(models)],
        env=vllm_environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    fused = ("llama", "qwen2", "gemma2", "mixtral", "mistral")
    assert {name: found[name] for name in fused} == dict.fromkeys(fused, FUSED)
    assert found["gpt2"][2] is None
    assert found["phimoe"][2] is None, "its norms are LayerNorms that add nothing"
    assert found["stablelm"][4] is False, "its layers take and give the stream, and return a residual beside it"
    assert found["phimoe"][4] is False, "its layers return the stream and a residual that nobody reads"


class Layer(nn.Module):
    """The form that is known."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        """Runs."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return hidden_states, residual


class Scaled(nn.Module):
    """Something happens to the stream before the norm."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        hidden_states = hidden_states * 2
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return hidden_states, residual


class OtherNorm(nn.Module):
    """Another norm for the first layer."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        if residual is None:
            residual = hidden_states
            hidden_states = self.other(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return hidden_states, residual


class Model(nn.Module):
    """The form that is known."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Peeking(Model):
    """Changes the stream between layers."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
            hidden_states = hidden_states + 1
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Scaling(Model):
    """Gives the layer something else than the stream."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states * 2, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class LateNorm(Model):
    """Adds the residual itself."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        return self.norm(hidden_states + residual)


@pytest.fixture
def every_norm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no vLLM norms; which classes count is tested on real models."""
    monkeypatch.setattr("server.engine.fusion._weight_offset", lambda norm: None if norm is None else 0.0)


def built(model: type[nn.Module], *layers: type[nn.Module]) -> tuple[nn.Module, dict[int, nn.Module]]:
    owner = model()
    owner.norm = nn.Identity()
    owner.layers = nn.ModuleList(layer() for layer in layers)
    for layer in owner.layers:
        layer.input_layernorm = nn.Identity()
    return owner, dict(enumerate(owner.layers))


@pytest.mark.usefixtures("every_norm_counts")
@pytest.mark.parametrize(
    ("model", "layers", "fused"),
    [
        (Model, (Layer, Layer, Layer), [0, 1, 2]),
        (Model, (Layer, Scaled, Layer), [1, 2]),
        (Model, (Layer, OtherNorm, Layer), [1, 2]),
        (Peeking, (Layer, Layer, Layer), []),
        (Scaling, (Layer, Layer, Layer), []),
        (LateNorm, (Layer, Layer, Layer), [0, 1]),
    ],
)
def test_only_the_known_form_is_fused(
    model: type[nn.Module], layers: tuple[type[nn.Module], ...], fused: list[int]
) -> None:
    owner, present = built(model, *layers)
    norms = norms_after(owner, present, len(present))
    assert list(norms) == fused
    for index in fused:
        expected = owner.norm if index == 2 else owner.layers[index + 1].input_layernorm
        assert norms[index].module is expected


class Reducing(Layer):
    """Sums over the ranks by itself."""

    def forward(self, hidden_states, residual):  # type: ignore[no-untyped-def]
        if residual is not None:
            hidden_states, residual = fused_allreduce_rms_norm(hidden_states, residual, self.norm)  # noqa: F821
        return hidden_states, residual


def test_layers_that_sum_over_the_ranks_by_themselves() -> None:
    assert reduces_itself(forward_of(Reducing()))
    assert not reduces_itself(forward_of(Layer()))


@pytest.mark.usefixtures("every_norm_counts")
def test_the_last_layer_of_a_stage_is_not_fused() -> None:
    owner, present = built(Model, Layer, Layer, Layer)
    # Some models have the last norm on every stage, also where it never runs.
    assert owner.norm is not None
    assert list(norms_after(owner, {0: present[0], 1: present[1]}, 3)) == [0]
