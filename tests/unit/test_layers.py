"""Decoder layers: discovery by structure, and wrapping, on models made by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.engine.batch import Sizes, SteeredBatch
from server.engine.compat import IncompatibleVllmError
from server.engine.layers import SteeredLayer, SteeredModel, find_decoder_layers, steer_model
from server.engine.program import Program, Step
from server.engine.steering import Steering, Term
from server.engine.step_counts import Scheduled
from steering_kernels import Kind

SIZE, NUM_LAYERS = 4, 3


class Block(nn.Module):
    """Like a fused vLLM layer: (hidden, residual) in and out."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.attention = nn.Linear(SIZE, SIZE)
        self.mlp = nn.Linear(SIZE, SIZE)
        if experts:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(SIZE, 2), nn.Linear(2, SIZE)) for _ in range(experts))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        residual = hidden if residual is None else hidden + residual
        return self.mlp(self.attention(residual)), residual


class StaleBlock(Block):
    """Returns the residual stream beside a residual that the next one does not read."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        residual = hidden
        return hidden + self.mlp(self.attention(hidden)), residual


class SilentBlock(Block):
    """Returns two tensors, and its source does not say what they are."""

    def forward(self, hidden: Tensor, other: Tensor | None = None) -> Any:
        return hidden, hidden


class PlainBlock(Block):
    """Returns the residual stream itself."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        return hidden + self.mlp(self.attention(hidden))


class OtherBlock(Block):
    """A hybrid model's second kind of layer."""


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(SIZE, SIZE)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(blocks)
        for name, module in others.items():
            self.add_module(name, module)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for block in self.model.layers:
            output = block(hidden, residual)
            hidden, residual = output if isinstance(output, tuple) else (output, None)
        return hidden if residual is None else hidden + residual


class StaleModel(Model):
    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for block in self.model.layers:
            hidden, residual = block(hidden, residual)
        return hidden


def blocks(count: int = NUM_LAYERS) -> list[nn.Module]:
    return [Block() for _ in range(count)]


def is_found(model: Model) -> bool:
    owner, found = find_decoder_layers(model, NUM_LAYERS)
    expected = dict(enumerate(model.model.layers))
    return owner is model.model and found.keys() == expected.keys() and all(found[i] is expected[i] for i in expected)


class TestFinding:
    def test_by_length(self) -> None:
        assert is_found(Model(*blocks(), vision=nn.ModuleList(blocks(2)), mtp=nn.ModuleList(blocks(1))))

    def test_experts_inside_the_layers_do_not_count(self) -> None:
        assert is_found(Model(*(Block(experts=NUM_LAYERS) for _ in range(NUM_LAYERS))))

    def test_layers_of_several_classes(self) -> None:
        assert is_found(Model(Block(), OtherBlock(), Block()))

    @pytest.mark.parametrize(
        "others",
        [[nn.Linear(SIZE, SIZE)] * NUM_LAYERS, [nn.Sequential(nn.ReLU(), nn.ReLU())] * NUM_LAYERS],
        ids=["single-modules", "no-parameters"],
    )
    def test_other_lists_of_that_length(self, others: list[nn.Module]) -> None:
        assert is_found(Model(*blocks(), norms=nn.ModuleList(others)))

    def test_none(self) -> None:
        with pytest.raises(IncompatibleVllmError, match=r"layers of Model: expected one list of 3 layers, found none"):
            find_decoder_layers(Model(*blocks(2)), NUM_LAYERS)

    def test_two(self) -> None:
        with pytest.raises(IncompatibleVllmError, match=r"found model\.layers, vision\. This architecture"):
            find_decoder_layers(Model(*blocks(), vision=nn.ModuleList(blocks())), NUM_LAYERS)

    def test_two_names_for_one_list(self) -> None:
        model = Model(*blocks())
        model.second = nn.Module()
        model.second.same = nn.ModuleList(model.model.layers)
        assert is_found(model)

    def test_names_that_only_look_nested(self) -> None:
        """`layers_extra` is not inside `layers`."""
        model = nn.Module()
        model.layers, model.layers_extra = nn.ModuleList(blocks()), nn.ModuleList(blocks())
        with pytest.raises(IncompatibleVllmError, match=r"found layers, layers_extra"):
            find_decoder_layers(model, NUM_LAYERS)

    def test_a_stage_of_a_pipeline(self) -> None:
        class PPMissingLayer(nn.Identity):
            """As in vLLM: stands where another stage has the layer."""

        model = Model(PPMissingLayer(), Block(), PPMissingLayer())
        owner, found = find_decoder_layers(model, NUM_LAYERS)
        assert owner is model.model
        assert list(found) == [1] and found[1] is model.model.layers[1]


def wrapped(model: Model) -> tuple[SteeredBatch, SteeredModel]:
    sizes = Sizes(num_rows=4, num_layers=NUM_LAYERS, hidden_size=SIZE, vocab_size=9, max_num_reqs=2, max_num_tokens=8)
    batch = SteeredBatch(sizes, torch.float32, torch.device("cpu"))
    batch.pool.load("a", Program(torch.full((1, SIZE), 0.5), (Step(1, Kind.ADD, write=0),)))
    return batch, steer_model(model, NUM_LAYERS, batch, fuse=False)


def run_with(batch: SteeredBatch, *step: Scheduled, strength: float = -2.0) -> None:
    """As if these requests were the batch; "r" is steered."""
    params = SimpleNamespace(extra_args=Steering("r", (Term("a", strength, "all"),)).to_extra_args())
    batch.add("r", params, 1)
    batch.fill(step, lambda index: ())


class Batched(Block):
    """Like a layer of vLLM's Transformers backend: [1, num_tokens, hidden_size] in and out."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        return (hidden[0] + self.mlp(self.attention(hidden[0])))[None]


class Streams(Block):
    """Several streams of the same tokens."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        return hidden.expand(2, *hidden.shape[-2:]).clone()


@torch.no_grad()
def test_a_batch_dimension_of_1() -> None:
    model = Model(*(Batched() for _ in range(NUM_LAYERS)))
    batch, _ = wrapped(model)
    hidden = torch.randn(1, 3, SIZE)
    unsteered = model(hidden.clone())
    run_with(batch, Scheduled("other", 0, 1), Scheduled("r", 0, 1))
    steered = model(hidden.clone())
    assert torch.equal(steered[0, [0, 2]], unsteered[0, [0, 2]])
    assert not torch.allclose(steered[0, 1], unsteered[0, 1])


@torch.no_grad()
def test_several_streams_are_refused() -> None:
    model = Model(*(Streams() for _ in range(NUM_LAYERS)))
    wrapped(model)
    with pytest.raises(IncompatibleVllmError, match=r"Streams returns 3 dimensions \(2, 3, 4\), expected"):
        model(torch.randn(3, SIZE))


@torch.no_grad()
def test_two_tensors_that_say_nothing_are_refused() -> None:
    model = Model(*(SilentBlock() for _ in range(NUM_LAYERS)))
    wrapped(model)
    with pytest.raises(IncompatibleVllmError, match=r"SilentBlock returns two tensors .* not supported"):
        model(torch.randn(3, SIZE))


@torch.no_grad()
def test_a_clamp_sees_the_stream_and_not_a_stale_residual() -> None:
    model = StaleModel(*(StaleBlock() for _ in range(NUM_LAYERS)))
    batch, _ = wrapped(model)
    axis = torch.nn.functional.normalize(torch.ones(1, SIZE))
    batch.pool.unload("a")
    batch.pool.load("a", Program(axis, (Step(1, Kind.CLAMP, read=0, write=0, a=3.0, b=3.0),)))
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    run_with(batch, Scheduled("r", 0, 2), strength=1.0)
    model(torch.randn(2, SIZE))
    torch.testing.assert_close(seen[0] @ axis[0], torch.full((2,), 3.0))


@pytest.mark.parametrize("cls", [Block, PlainBlock])
@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_wrapped_layers_steer_their_output(cls: type[Block], backend: str | None) -> None:
    model = Model(*(cls() for _ in range(NUM_LAYERS)))
    batch, _ = wrapped(model)
    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    hidden = torch.randn(3, SIZE)
    unsteered = run(hidden.clone())
    run_with(batch, Scheduled("other", 0, 1), Scheduled("r", 0, 1), Scheduled("third", 5, 1))
    steered = run(hidden.clone())
    # By hand: the residual stream of token 1 is moved after layer 1, and nothing else.
    stream = hidden.clone()
    for index, block in enumerate(model.model.layers):
        stream = stream + block.mlp(block.attention(stream))
        if index == 1:
            stream[1] += -2.0 * 0.5
    torch.testing.assert_close(steered, stream)
    assert torch.equal(steered[[0, 2]], unsteered[[0, 2]])
    assert not torch.allclose(steered[1], unsteered[1])
    run_with(batch)
    assert torch.equal(run(hidden.clone()), unsteered)


def test_wrapping_keeps_what_a_layer_is() -> None:
    model = Model(Block(), OtherBlock(), Block())
    names = list(model.state_dict())
    batch, steered = wrapped(model)
    first, second, third = model.model.layers
    assert isinstance(first, Block) and isinstance(second, OtherBlock) and isinstance(first, SteeredLayer)
    assert type(first) is type(third) and type(first).__name__ == "SteeredBlock"
    assert list(model.state_dict()) == names, "the tables must not be saved or expected in a checkpoint"
    assert steered == SteeredModel(fused=(), in_place=(0, 1, 2))
    # The addresses are what CUDA graphs replay with.
    assert second.steering_pool.data_ptr() == batch.pool.rows.data_ptr()
    assert second.steering_codes.data_ptr() == batch.slots.codes[1].data_ptr()
    assert second.steering_params.data_ptr() == batch.slots.params[1].data_ptr()
    assert second.steering_gates.data_ptr() == batch.gates.data_ptr()
