"""Decoder layers: discovery by structure, and wrapping, on models made by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.engine.compat import IncompatibleVllmError
from server.engine.layers import SteeredLayer, find_decoder_layers, wrap_layers
from server.engine.slots import RowPool, SlotTable, TokenTable

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


def blocks(count: int = NUM_LAYERS) -> list[nn.Module]:
    return [Block() for _ in range(count)]


def is_found(model: Model) -> bool:
    found = find_decoder_layers(model, NUM_LAYERS)
    return len(found) == NUM_LAYERS and all(one is other for one, other in zip(found, model.model.layers, strict=True))


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

    def test_names_that_only_look_nested(self) -> None:
        """`layers_extra` is not inside `layers`."""
        model = nn.Module()
        model.layers, model.layers_extra = nn.ModuleList(blocks()), nn.ModuleList(blocks())
        with pytest.raises(IncompatibleVllmError, match=r"found layers, layers_extra"):
            find_decoder_layers(model, NUM_LAYERS)


def wrapped(model: Model) -> tuple[RowPool, SlotTable, TokenTable]:
    device = torch.device("cpu")
    pool = RowPool(4, SIZE, torch.float32, device)
    pool.load("a", {1: torch.full((1, SIZE), 0.5)})
    table, tokens = SlotTable(pool, NUM_LAYERS, 4), TokenTable(8, device)
    layers = find_decoder_layers(model, NUM_LAYERS)
    wrap_layers(layers, pool.rows, table.write_rows, table.scales, tokens.slot_ids, tokens.strengths)
    return pool, table, tokens


@pytest.mark.parametrize("cls", [Block, PlainBlock])
@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_wrapped_layers_steer_their_output(cls: type[Block], backend: str | None) -> None:
    model = Model(*(cls() for _ in range(NUM_LAYERS)))
    _, table, tokens = wrapped(model)
    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    hidden = torch.randn(3, SIZE)
    unsteered = run(hidden.clone())
    tokens.host_slot_ids[1] = table.slot_of((("a", 1.0),), set)
    tokens.host_strengths[1] = -2.0
    tokens.publish(2)
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
    tokens.clear()
    tokens.publish(0)
    assert torch.equal(run(hidden.clone()), unsteered)


def test_wrapping_keeps_what_a_layer_is() -> None:
    model = Model(Block(), OtherBlock(), Block())
    names = list(model.state_dict())
    pool, table, _ = wrapped(model)
    first, second, third = model.model.layers
    assert isinstance(first, Block) and isinstance(second, OtherBlock) and isinstance(first, SteeredLayer)
    assert type(first) is type(third) and type(first).__name__ == "SteeredBlock"
    assert list(model.state_dict()) == names, "the tables must not be saved or expected in a checkpoint"
    # The addresses are what CUDA graphs replay with.
    assert second.steering_pool.data_ptr() == pool.rows.data_ptr()
    assert second.steering_write_rows.data_ptr() == table.write_rows[1].data_ptr()
    assert second.steering_scales.data_ptr() == table.scales[1].data_ptr()
