"""The operators inside compiled graphs and CUDA graphs: mutations in order, buffers read anew, nothing copied."""

import re
from typing import NamedTuple

import pytest
import torch
from cases import EPSILON, READS, WRITES, Case, make_case
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from steering_kernels import Flag, Kind, backends, steer_, steer_add_rms_norm_
from steering_kernels.entry import Entry

NUM_LAYERS, NUM_TOKENS, HIDDEN_SIZE = 3, 24, 40
SLOTS = [
    [Entry(Kind.ADD, write=WRITES[0])],
    [Entry(Kind.ROTATE, READS[0], READS[0], READS[1], READS[1], a=0.7)],
    [
        Entry(Kind.CONDITION, READS[2], gate_out=2, flags=Flag.HARD, b=1.0),
        Entry(Kind.ADD, write=WRITES[1], gate=2, flags=Flag.KEEP_NORM),
    ],
    [Entry(Kind.ADD, write=WRITES[2], gate=2)],
    [],
]
# torch's own import of its inductor backend.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


class Tables(NamedTuple):
    """Buffers that all layers read, in the order of the operators' arguments."""

    pool: Tensor
    codes: Tensor
    params: Tensor
    slot_ids: Tensor
    strengths: Tensor
    gates: Tensor

    @staticmethod
    def of(case: Case) -> "Tables":
        return Tables(*(getattr(case, name) for name in Tables._fields))

    def rewrite_(self) -> None:
        """What the runner does between two steps."""
        self.pool.copy_(self.pool.roll(1, 0))
        self.codes.copy_(self.codes.roll(1, 0))
        self.params.copy_(self.params.roll(1, 0))
        self.slot_ids.copy_(self.slot_ids.flip(0).clamp_min(-1))
        self.strengths.copy_(0.5 + self.strengths.nan_to_num().flip(0))
        self.gates.copy_(self.gates.flip(1))


def stack(hidden: Tensor, residual: Tensor, weight: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Layers that use both operators, with work around them for a compiler to reorder if it missed a mutation."""
    for layer in range(NUM_LAYERS):
        steer_add_rms_norm_(hidden, residual, weight, EPSILON, 1.0, *tables)
        hidden = torch.nn.functional.silu(hidden * 2) + residual[:1]
        steer_(hidden, *tables, residual if layer % 2 else None)
        hidden = hidden + hidden[:1] * tables.gates[:1, 2:3]
    return hidden, residual


def make() -> tuple[Case, Tables]:
    case = make_case(SLOTS, [token % 6 - 1 for token in range(NUM_TOKENS)], HIDDEN_SIZE)
    return case, Tables.of(case)


def run(function: object, case: Case, tables: Tables, num_tokens: int) -> list[Tensor]:
    """Results of a step, and the gates that it left behind; its inputs stay as they were."""
    tables = tables._replace(gates=tables.gates.clone())
    hidden, residual = case.hidden[:num_tokens].clone(), case.residual[:num_tokens].clone()
    return [*function(hidden, residual, case.weight, tables), hidden, tables.gates]  # type: ignore[operator]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_stack_equals_the_eager_one(compiler: str) -> None:
    case, tables = make()
    compiled = torch.compile(stack, fullgraph=True, backend=compiler, dynamic=True)
    before = run(stack, case, tables, NUM_TOKENS)
    assert_same(run(compiled, case, tables, NUM_TOKENS), before)
    # Rewritten in place between steps: compiled code must read the buffers anew, at any number of tokens.
    tables.rewrite_()
    for num_tokens in (NUM_TOKENS, 7):
        after = run(stack, case, tables, num_tokens)
        assert_same(run(compiled, case, tables, num_tokens), after)
        assert not torch.allclose(after[0], before[0][:num_tokens], atol=1e-2)


def test_inductor_passes_every_buffer_as_it_is() -> None:
    """A copy of the pool or the tables per layer would cost more than the steering."""
    case, tables = make()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True)
    arguments = (case.hidden.clone(), case.residual.clone(), case.weight, tables)
    _, (code,) = run_and_get_code(compiled, *arguments)
    calls = re.findall(r"torch\.ops\.expertsteer\.(\w+)\.default\((.*)\)", code)
    assert [name for name, _ in calls] == ["steer_add_rms_norm_", "steer_"] * NUM_LAYERS
    shared = set()
    for name, words in calls:
        passed = words.split(", ")
        first = passed.index("1.0") + 1 if name == "steer_add_rms_norm_" else 1
        shared.add(tuple(passed[first : first + len(Tables._fields)]))
    (names,) = shared  # the same variables in every call
    assert all(re.fullmatch(r"arg\d+_1", name) for name in names), "a buffer was copied on its way"


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_of_steer(residual: bool) -> None:
    case, tables = make()
    arguments = (case.hidden, *tables, case.residual if residual else None)
    result = torch.library.opcheck(torch.ops.expertsteer.steer_.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("weight", [True, False])
def test_opcheck_of_steer_add_rms_norm(weight: bool) -> None:
    case, tables = make()
    arguments = (case.hidden, case.residual, case.weight if weight else None, EPSILON, 1.0, *tables)
    result = torch.library.opcheck(torch.ops.expertsteer.steer_add_rms_norm_.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_cuda_graph_reads_tables_anew(backend: str, dtype: torch.dtype) -> None:
    if backend not in backends.available("cuda", dtype):
        pytest.skip(f"backend {backend} does not run {dtype} on this machine")
    module = backends.available("cuda", dtype)[backend]
    case = make_case(SLOTS, [token % 6 - 1 for token in range(NUM_TOKENS)], HIDDEN_SIZE, dtype)
    on_device = Case(*(value.cuda() if isinstance(value, Tensor) else value for value in case))
    static = on_device.clone()
    static.run(module, "fused")  # warm-up outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.run(module, "fused")
    Tables.of(on_device).rewrite_()
    expected = on_device.clone()
    for ours, theirs in zip(static, on_device, strict=True):
        if isinstance(ours, Tensor):
            ours.copy_(theirs)
    graph.replay()
    expected.run(module, "fused")
    assert torch.equal(static.hidden, expected.hidden)
    assert torch.equal(static.residual, expected.residual)
    assert torch.equal(static.gates, expected.gates)
