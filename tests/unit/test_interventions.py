"""Every kind of intervention: what a manifest may say about it, and that the engine's program does what it says."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from artifacts.bundle import Bundle, BundleError, BundleErrorCode, load_bundle, write_bundle
from artifacts.gates import MAX_GATES
from artifacts.intervention import KindName
from artifacts.manifest import (
    MAX_INTERVENTIONS_PER_LAYER,
    Intervention,
    Manifest,
    ModelIdentity,
    from_metadata,
    to_metadata,
)
from server.engine.program import Program
from server.lowering import lower
from steering_kernels import CODE_WIDTH, MAX_OPS, NUM_GATES, PARAM_WIDTH, Code, Kind, Param
from steering_kernels.reference import steer_

HIDDEN_SIZE, LAYER, STRENGTH = 16, 2, 0.75
KINDS = get_args(KindName)
READ, WRITE = f"runtime.{LAYER}.0.read", f"runtime.{LAYER}.0.write"
UNIT = torch.nn.functional.normalize(torch.linspace(-1, 2, HIDDEN_SIZE), dim=0)
PLANE = torch.linalg.qr(torch.randn(HIDDEN_SIZE, 2, generator=torch.Generator().manual_seed(0))).Q.T.contiguous()
ROW = torch.linspace(3, -1, HIDDEN_SIZE)
TARGET = ModelIdentity(id="tiny", architecture="LlamaForCausalLM", hidden_size=HIDDEN_SIZE, num_layers=6)


SETS_FEATURE = {"read": True, "write": True, "edit": "set"}
GOOD_FEATURE = SETS_FEATURE | {"activation": "relu", "value": 1.0}
GOOD_GATED = {"read": True, "write": True, "threshold": 0.5}


def manifest_of(*steps: dict[str, Any], **changes: Any) -> Manifest:
    fields = {"name": "kinds", "target": TARGET, "recommended_strength": 1.0, "maximum_strength": 2.0}
    return Manifest.model_validate(fields | {"interventions": list(steps)} | changes)


def step(kind: str, layer: int = LAYER, index: int = 0, **fields: Any) -> dict[str, Any]:
    """A step whose `read` and `write` say which tensors it has, and whose unknown fields are parameters."""
    known = {name: fields.pop(name) for name in ("keep_norm", "gate", "sets") if name in fields}
    tensors = {role: f"runtime.{layer}.{index}.{role}" for role in ("read", "write") if fields.pop(role, False)}
    return {"layer": layer, "kind": kind, "parameters": fields} | known | tensors


def bundle_of(tensors: Mapping[str, Tensor], *steps: dict[str, Any], **changes: Any) -> Bundle:
    return Bundle("sha256:" + "0" * 64, manifest_of(*steps, **changes), 100, dict(tensors))


def applied(program: Program, layer: int, hidden: Tensor, strength: float, gates: Tensor | None = None) -> Tensor:
    """What the reference operator makes of `hidden` [num_tokens, hidden_size] with one layer of a program."""
    codes = torch.zeros(1, MAX_OPS, CODE_WIDTH, dtype=torch.int32)
    params = torch.zeros(1, MAX_OPS, PARAM_WIDTH)
    for index, each in enumerate(entry for entry in program.steps if entry.layer == layer):
        values = (each.kind, each.read, each.write, each.read2, each.write2, each.gate, each.gate_out, each.flags)
        codes[0, index] = torch.tensor([int(value) for value in values])
        params[0, index, [Param.SCALE, Param.A, Param.B, Param.C]] = torch.tensor([1.0, each.a, each.b, each.c])
    assert Code.FLAGS == CODE_WIDTH - 1
    count = hidden.shape[0]
    result = hidden.clone()
    gates = torch.zeros(count, NUM_GATES) if gates is None else gates
    slots = torch.zeros(count, dtype=torch.int32)
    steer_(result, program.rows, codes, params, slots, torch.full((count,), strength), gates)
    return result


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)) * 2


def sigmoid_at(threshold: float, slope: float) -> Callable[[Tensor], Tensor]:
    return lambda p: torch.sigmoid(slope * (p - threshold))


def turned(x: Tensor, angle: Tensor | float) -> Tensor:
    """x turned in PLANE by an angle, through the rotation matrix."""
    angle = torch.as_tensor(angle, dtype=x.dtype).expand(x.shape[0])
    p, q = (x @ PLANE.T).T
    turned_p, turned_q = p * angle.cos() - q * angle.sin(), p * angle.sin() + q * angle.cos()
    return x + (turned_p - p)[:, None] * PLANE[0] + (turned_q - q)[:, None] * PLANE[1]


def shortest_turn(x: Tensor, angle: float, s: float) -> Tensor:
    """Part s of the shortest turn in PLANE that brings x to an angle."""
    p, q = (x @ PLANE.T).T
    way = torch.tensor([math.remainder(angle - each, 2 * math.pi) for each in torch.atan2(q, p).tolist()])
    return turned(x, s * way)


def along(values: Callable[[Tensor], Tensor], direction: Tensor) -> Callable[[Tensor, float], Tensor]:
    """x += s * values(UNIT . x) * direction."""
    return lambda x, s: x + s * values(x @ UNIT)[:, None] * direction


# The formulas of `Manifest`, written once more without any code of the project.
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], Callable[[Tensor, float], Tensor]]] = {
    "add": (step("add", write=True), {WRITE: ROW}, lambda x, s: x + s * ROW),
    "add, norm kept": (
        step("add", write=True, keep_norm=True),
        {WRITE: ROW},
        lambda x, s: (x + s * ROW) * (x.norm(dim=1) / (x + s * ROW).norm(dim=1))[:, None],
    ),
    "add_relative": (
        step("add_relative", write=True),
        {WRITE: UNIT},
        lambda x, s: x + s * x.norm(dim=1, keepdim=True) * UNIT,
    ),
    "project": (step("project", read=True), {READ: UNIT}, along(lambda p: -p, UNIT)),
    "clamp from below": (
        step("clamp", read=True, minimum=0.5),
        {READ: UNIT},
        along(lambda p: p.clamp(min=0.5) - p, UNIT),
    ),
    "clamp from above": (
        step("clamp", read=True, maximum=0.5),
        {READ: UNIT},
        along(lambda p: p.clamp(max=0.5) - p, UNIT),
    ),
    "clamp to a value": (
        step("clamp", read=True, minimum=1.5, maximum=1.5),
        {READ: UNIT},
        along(lambda p: 1.5 - p, UNIT),
    ),
    "gated_add": (
        step("gated_add", read=True, write=True, threshold=0.3, slope=-4.0),
        {READ: UNIT, WRITE: ROW},
        along(sigmoid_at(0.3, -4.0), ROW),
    ),
    "gated_add by cosine": (
        step("gated_add", read=True, write=True, threshold=0.1, slope=9.0, cosine=True),
        {READ: UNIT, WRITE: ROW},
        lambda x, s: x + s * torch.sigmoid(9 * (x @ UNIT / x.norm(dim=1) - 0.1))[:, None] * ROW,
    ),
    "gated_add over a step": (
        step("gated_add", read=True, write=True, threshold=0.3),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: (p > 0.3).float(), ROW),
    ),
    "gated_add under a step": (
        step("gated_add", read=True, write=True, threshold=0.3, below=True),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: (p < 0.3).float(), ROW),
    ),
    "feature doubled": (
        step("feature", read=True, write=True, bias=-0.5, activation="relu", edit="scale", value=2.0),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: (p - 0.5).relu(), ROW),
    ),
    "feature set": (
        step("feature", **SETS_FEATURE, bias=0.25, activation="jump_relu", threshold=0.75, value=3.0),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: 3 - torch.where(p + 0.25 > 0.75, p + 0.25, 0.0), ROW),
    ),
    "feature raised": (
        step("feature", read=True, write=True, activation="identity", edit="add", value=-2.0),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: torch.full_like(p, -2.0), ROW),
    ),
    "feature off": (
        step("feature", read=True, write=True, activation="identity", edit="scale", value=0.0),
        {READ: UNIT, WRITE: ROW},
        along(lambda p: -p, ROW),
    ),
    "rotate by an angle": (
        step("rotate", read=True, angle=0.7, mode="relative"),
        {READ: PLANE},
        lambda x, s: turned(x, s * 0.7),
    ),
    "rotate to an angle": (
        step("rotate", read=True, angle=-2.5, mode="absolute"),
        {READ: PLANE},
        lambda x, s: shortest_turn(x, -2.5, s),
    ),
    "affine": (
        step("affine", read=True, write=True),
        {READ: ROW / 10, WRITE: ROW},
        lambda x, s: x + s * (ROW / 10 * x + ROW),
    ),
    "affine factors": (step("affine", read=True), {READ: ROW}, lambda x, s: x + s * ROW * x),
    "affine offsets": (step("affine", write=True), {WRITE: ROW}, lambda x, s: x + s * ROW),
}  # fmt: skip


def test_every_kind_has_a_case() -> None:
    assert {case[0]["kind"] for case in CASES.values()} | {"condition"} == set(KINDS)
    assert {kind.upper() for kind in KINDS} | {"END"} == {kind.name for kind in Kind}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strength", [STRENGTH, 1.0, -0.5])
def test_the_program_does_what_the_manifest_says(tmp_path: Path, name: str, strength: float) -> None:
    fields, tensors, formula = CASES[name]
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_of(fields), dict(tensors))
    program = lower(load_bundle(path), {})
    assert [step.layer for step in program.steps] == [LAYER]
    assert program.rows.shape == (sum(tensor.numel() for tensor in tensors.values()) // HIDDEN_SIZE, HIDDEN_SIZE)
    x = tokens()
    torch.testing.assert_close(applied(program, LAYER, x, strength), formula(x, strength), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(formula(x, strength), x), "the case must be able to fail"


@pytest.mark.parametrize("fields", [{}, {"slope": 3.0}, {"below": True}, {"cosine": True}])
def test_a_condition_opens_the_gate_of_a_later_layer(fields: dict[str, Any]) -> None:
    condition = step("condition", layer=1, read=True, threshold=0.2, sets="open", **fields)
    tensors = {"runtime.1.0.read": UNIT, "runtime.3.0.write": ROW, "runtime.3.1.write": UNIT}
    bundle = bundle_of(
        tensors,
        # Listed order is of no matter between layers.
        step("add", layer=3, write=True, gate="open"),
        step("add", layer=3, index=1, write=True),
        condition,
    )
    program = lower(bundle, {})
    assert (program.num_gates, program.triggers) == (1, {})
    x, gates = tokens(), torch.full((40, NUM_GATES), 0.5)
    assert torch.equal(applied(program, 1, x, STRENGTH, gates), x)
    p = x @ UNIT / (x.norm(dim=1) if "cosine" in fields else 1)
    step_of = (p < 0.2) if "below" in fields else (p > 0.2)
    expected = torch.sigmoid(3 * (p - 0.2)) if "slope" in fields else step_of.float()
    torch.testing.assert_close(gates[:, 0], expected)
    assert 0.1 < expected.mean() < 0.9
    torch.testing.assert_close(
        applied(program, 3, x, STRENGTH, gates), x + STRENGTH * (expected[:, None] * ROW + UNIT), rtol=1e-5, atol=1e-5
    )


def test_triggers_and_conditions_have_gates_of_their_own() -> None:
    bundle = bundle_of(
        {"runtime.2.0.read": UNIT, "runtime.2.1.write": ROW, "runtime.2.2.write": ROW, "runtime.2.3.write": ROW},
        step("condition", read=True, threshold=0.0, sets="cond"),
        step("add", index=1, write=True, gate="late"),
        step("add", index=2, write=True, gate="cond"),
        step("add", index=3, write=True, gate="early"),
        triggers={"early": {"token_ids": [7]}, "late": {"token_ids": [3, 5]}},
    )
    program = lower(bundle, {"early": (7,), "late": (3, 5)})
    assert bundle.manifest.gates == ("early", "late", "cond")
    assert program.num_gates == 3
    assert dict(program.triggers) == {0: (7,), 1: (3, 5)}
    assert [(each.gate, each.gate_out) for each in program.steps] == [(-1, 2), (1, -1), (2, -1), (0, -1)]


def test_rows_are_stored_once_in_listed_order() -> None:
    rows = {"runtime.4.0.read": UNIT, "runtime.1.0.read": PLANE, "runtime.4.1.write": ROW}
    bundle = bundle_of(
        rows,
        step("clamp", layer=4, read=True, maximum=1.0),
        step("rotate", layer=1, read=True, angle=1.0, mode="relative"),
        step("add", layer=4, index=1, write=True),
    )
    program = lower(bundle, {})
    assert torch.equal(program.rows, torch.stack([UNIT, *PLANE, ROW]))
    numbers = [(each.layer, each.read, each.write, each.read2, each.write2) for each in program.steps]
    assert numbers == [(4, 0, 0, -1, -1), (1, 1, 1, 2, 2), (4, -1, 3, -1, -1)]
    assert (program.steps[0].a, program.steps[0].b) == (-math.inf, 1.0)


WRONG = {
    "add that reads": (step("add", read=True, write=True), "kind 'add' takes no read"),
    "add without write": (step("add"), "kind 'add' needs write"),
    "add with a threshold": (step("add", write=True, threshold=0.1), "takes no threshold"),
    "add that sets": (step("add", write=True, sets="x"), "takes no sets"),
    "add_relative that reads": (step("add_relative", read=True, write=True), "takes no read"),
    "project that writes": (step("project", read=True, write=True), "takes no write"),
    "project with a value": (step("project", read=True, value=1.0), "takes no value"),
    "clamp without bounds": (step("clamp", read=True), "needs minimum, maximum or both"),
    "clamp with crossed bounds": (step("clamp", read=True, minimum=2.0, maximum=1.0), "minimum 2 is over maximum 1"),
    "clamp without read": (step("clamp", minimum=1.0), "needs read"),
    "clamp by cosine": (step("clamp", read=True, minimum=1.0, cosine=True), "takes no cosine"),
    "gated_add without threshold": (step("gated_add", read=True, write=True, slope=1.0), "needs threshold"),
    "gated_add without write": (step("gated_add", read=True, threshold=1.0), "needs write"),
    "gated_add flat": (step("gated_add", **GOOD_GATED, slope=0.0), "slope 0 is nearer to 0 than 1e-06"),
    "gated_add both ways": (step("gated_add", **GOOD_GATED, slope=1.0, below=True), "give a slope below 0 instead"),
    "gated_add past every cosine": (
        step("gated_add", **GOOD_GATED | {"threshold": 1.5}, cosine=True), r"1.5 is outside \[-1, 1\]"
    ),
    "feature without edit": (step("feature", read=True, write=True, activation="relu", value=1.0), "needs edit"),
    "feature without value": (step("feature", read=True, write=True, activation="relu", edit="set"), "needs value"),
    "feature of another activation": (step("feature", **GOOD_FEATURE | {"activation": "gelu"}), "should be 'relu'"),
    "feature of another edit": (step("feature", **GOOD_FEATURE | {"edit": "square"}), "Input should be 'scale'"),
    "relu with a threshold": (step("feature", **GOOD_FEATURE, threshold=0.1), "'relu' takes no threshold"),
    "jump_relu without one": (step("feature", **GOOD_FEATURE | {"activation": "jump_relu"}), "needs threshold"),
    "rotate without mode": (step("rotate", read=True, angle=1.0), "needs mode"),
    "rotate in degrees": (step("rotate", read=True, angle=90.0, mode="relative"), "angle 90 is outside .* radians"),
    "rotate that writes": (step("rotate", read=True, write=True, angle=1.0, mode="relative"), "takes no write"),
    "affine of nothing": (step("affine"), "needs read"),
    "affine with a bias": (step("affine", read=True, bias=1.0), "takes no bias"),
    "condition that writes": (step("condition", read=True, write=True, threshold=1.0, sets="x"), "takes no write"),
    "condition that sets nothing": (step("condition", read=True, threshold=1.0), "needs sets"),
    "condition with a gate": (step("condition", read=True, threshold=1.0, sets="x", gate="y"), "takes no gate"),
    "condition that keeps": (step("condition", read=True, threshold=1.0, sets="x", keep_norm=True), "no keep_norm"),
    "unknown parameter": (step("add", write=True, colour=1.0), "Extra inputs"),
    "parameter without end": (step("clamp", read=True, maximum=math.inf), "finite number"),
    "parameter too large for what it is": (step("clamp", read=True, maximum=2e6), "less than or equal to 1000000"),
    "gate of another spelling": (step("add", write=True, gate="Open Sesame"), "match pattern"),
    "number for a flag": (step("gated_add", **GOOD_GATED, cosine=2), "valid boolean"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_intervention_takes_exactly_what_its_kind_acts_on(name: str) -> None:
    fields, pattern = WRONG[name]
    with pytest.raises(ValidationError, match=pattern):
        Intervention.model_validate(fields)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_refuses_a_missing_and_a_foreign_tensor_name(kind: str, kind_examples: dict[str, Any]) -> None:
    fields = {"layer": LAYER} | kind_examples[kind]
    with pytest.raises(ValidationError, match=r"needs (read|write)"):
        Intervention.model_validate(fields)
    role = "write" if kind.startswith("add") else "read"
    both = {"read": READ, "write": WRITE} if kind in ("gated_add", "feature") else {role: fields.get(role)}
    moved = fields | both | {role: f"runtime.{LAYER + 1}.0.{role}"}
    with pytest.raises(ValidationError, match=f"must be called runtime.{LAYER}.0.{role}"):
        manifest_of(moved)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_a_file(kind: str, kind_examples: dict[str, Any], make_bundle: Callable[..., Path]) -> None:
    steps = [kind_examples[kind]]
    if kind == "condition":
        steps.append({"kind": "add", "gate": steps[0]["sets"]})
    bundle = load_bundle(make_bundle(kind.replace("_", "-"), [LAYER] * len(steps), 5, steps=steps))
    assert [each.kind for each in bundle.manifest.interventions] == [each["kind"] for each in steps]
    assert from_metadata(to_metadata(bundle.manifest)) == bundle.manifest
    said = json.loads(to_metadata(bundle.manifest)["manifest"])["interventions"][0]
    assert {key: value for key, value in said.items() if key not in ("layer", "read", "write")} == (
        {"parameters": {}} | steps[0]
    ), "what says nothing is not written"


VALUES = {
    "project, norm 1.002": (step("project", read=True), {READ: UNIT * 1.002}, BundleErrorCode.BAD_NORM, "divide it"),
    "clamp, norm 2": (step("clamp", read=True, maximum=1.0), {READ: UNIT * 2}, BundleErrorCode.BAD_NORM, "norm 2 and"),
    "cosine, norm 0.5": (
        step("gated_add", **GOOD_GATED, cosine=True), {READ: UNIT / 2, WRITE: ROW}, BundleErrorCode.BAD_NORM, "norm 0.5"
    ),
    "rotate, one row long": (
        step("rotate", read=True, angle=1.0, mode="relative"),
        {READ: PLANE * torch.tensor([[1.0], [1.01]])},
        BundleErrorCode.BAD_NORM,
        "norm 1.01",
    ),
    "rotate, skew": (
        step("rotate", read=True, angle=1.0, mode="relative"),
        {READ: torch.stack([PLANE[0], (PLANE[1] + 0.01 * PLANE[0]) / 1.00005])},
        BundleErrorCode.NOT_ORTHOGONAL,
        "dot product 0.0099",
    ),
    "rotate, the same twice": (
        step("rotate", read=True, angle=1.0, mode="relative"),
        {READ: torch.stack([UNIT, UNIT])},
        BundleErrorCode.NOT_ORTHOGONAL,
        "dot product 1",
    ),
    "rotate, one row": (
        step("rotate", read=True, angle=1.0, mode="relative"), {READ: UNIT}, BundleErrorCode.WRONG_SHAPE, r"\[2, 16\]"
    ),
    "project, two rows": (step("project", read=True), {READ: PLANE}, BundleErrorCode.WRONG_SHAPE, r"ask for \[16\]"),
    "gated_add, read of zeros": (
        step("gated_add", **GOOD_GATED), {READ: UNIT * 0, WRITE: ROW}, BundleErrorCode.BAD_NORM, "norm 0, outside"
    ),
    "feature, write too large": (
        step("feature", **GOOD_FEATURE), {READ: UNIT, WRITE: ROW * 1e7}, BundleErrorCode.BAD_NORM, "outside"
    ),
    "affine of zeros": (
        step("affine", read=True, write=True), {READ: UNIT * 0, WRITE: UNIT * 0}, BundleErrorCode.BAD_NORM, "zeros only"
    ),
    "affine too large": (step("affine", write=True), {WRITE: UNIT * 2e6}, BundleErrorCode.BAD_NORM, "outside"),
    "affine, NaN": (step("affine", read=True), {READ: UNIT * math.nan}, BundleErrorCode.NON_FINITE, "16 of 16"),
    "read missing": (step("gated_add", **GOOD_GATED), {WRITE: ROW}, BundleErrorCode.MISSING_TENSOR, READ),
    "read nobody names": (step("add", write=True), {READ: UNIT, WRITE: ROW}, BundleErrorCode.UNNAMED_TENSOR, READ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_rows_that_a_kind_cannot_use_are_refused(tmp_path: Path, name: str) -> None:
    fields, tensors, code, pattern = VALUES[name]
    with pytest.raises(BundleError, match=pattern) as caught:
        write_bundle(tmp_path / "b.safetensors", manifest_of(fields), dict(tensors))
    assert caught.value.code is code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        (step("project", read=True), {READ: UNIT * 1.0009}),
        (step("project", read=True), {READ: UNIT.bfloat16()}),
        (step("rotate", read=True, angle=1.0, mode="absolute"), {READ: PLANE.half()}),
        (step("gated_add", **GOOD_GATED), {READ: UNIT * 50, WRITE: ROW}),
        (step("affine", read=True, write=True), {READ: UNIT * 0, WRITE: ROW}),
        (step("affine", read=True, write=True), {READ: UNIT, WRITE: ROW * 0}),
    ],
)
def test_rows_within_the_tolerance_are_taken(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_of(fields), tensors)
    rows = load_bundle(path).rows
    assert all(torch.equal(rows[name], tensor.float()) for name, tensor in tensors.items())


def test_a_layer_holds_as_many_interventions_as_a_slot() -> None:
    steps = [step("add", index=index, write=True) for index in range(MAX_INTERVENTIONS_PER_LAYER)]
    assert len(manifest_of(*steps).interventions) == MAX_INTERVENTIONS_PER_LAYER
    with pytest.raises(ValidationError, match="9 interventions at layer 2 and 8 fit"):
        manifest_of(*steps, step("add", index=MAX_INTERVENTIONS_PER_LAYER, write=True))
    assert (MAX_INTERVENTIONS_PER_LAYER, MAX_GATES) == (MAX_OPS, NUM_GATES), "a bundle that is valid fits a slot"


def test_only_plain_additions_can_be_baked() -> None:
    plain = bundle_of({WRITE: ROW}, step("add", write=True))
    assert [(layer, row.tolist()) for layer, row in plain.additions()] == [(LAYER, ROW.tolist())]
    for fields, tensors, what in (
        (step("add", write=True, keep_norm=True), {WRITE: ROW}, "an addition with a gate or keep_norm"),
        (step("project", read=True), {READ: UNIT}, "of kind 'project'"),
    ):
        with pytest.raises(BundleError, match=f"at layer 2 is {what}") as caught:
            bundle_of(tensors, fields).additions()
        assert caught.value.code is BundleErrorCode.NOT_PLAIN_ADD


def test_excluded_spans_are_known_and_said_once() -> None:
    manifest = manifest_of(step("add", write=True), exclude=["tool_calls", "reasoning"])
    assert from_metadata(to_metadata(manifest)).exclude == ("tool_calls", "reasoning")
    for wrong in (["thoughts"], ["reasoning", "reasoning"]):
        with pytest.raises(ValidationError, match="exclude"):
            manifest_of(step("add", write=True), exclude=wrong)
