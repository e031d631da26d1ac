"""From a bundle's manifest to the engine's program: names become numbers, choices become flags."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from artifacts.bundle import Bundle
from artifacts.manifest import Intervention, Manifest, Parameters
from server.engine.program import Program, Step
from steering_kernels import Flag, Kind

_ACTIVATION = {"relu": Flag(0), "jump_relu": Flag.JUMP_RELU, "identity": Flag.IDENTITY}
_EDIT = {"scale": Flag(0), "set": Flag.EDIT_SET, "add": Flag.EDIT_ADD}


def kept_interventions(manifest: Manifest, layers: Collection[int] | None) -> list[Intervention]:
    """Interventions of a bundle that a profile applies: all of them, or those at some layers.

    Args:
        manifest: of the bundle.
        layers: the layers (0-based); None for all.

    Returns:
        In listed order. A condition stays where something that is kept waits for its gate, at whatever layer it reads.
    """
    if layers is None:
        return list(manifest.interventions)
    awaited = {step.gate for step in manifest.interventions if step.layer in layers and step.gate is not None}
    return [
        step
        for step in manifest.interventions
        if (step.sets in awaited if step.kind == "condition" else step.layer in layers)
    ]


def lower(bundle: Bundle, triggers: Mapping[str, tuple[int, ...]], layers: Collection[int] | None = None) -> Program:
    """The program that does what a bundle's manifest says.

    Each runtime tensor is stored once, also where a kind reads and writes the same rows.

    Args:
        bundle: passed every check.
        triggers: token ids by gate, of every trigger of the manifest.
        layers: see `kept_interventions`.
    """
    manifest = bundle.manifest
    kept = kept_interventions(manifest, layers)
    names = [name for step in kept for name in step.tensors]
    tensors = [bundle.rows[name].reshape(-1, manifest.target.hidden_size) for name in names]
    places: dict[str, int] = {}
    num_rows = 0
    for name, tensor in zip(names, tensors, strict=True):
        places[name] = num_rows
        num_rows += tensor.shape[0]
    gates = {gate: index for index, gate in enumerate(manifest.gates)}
    steps = tuple(_step(intervention, places, gates) for intervention in kept)
    return Program(torch.cat(tensors), steps, len(gates), {gates[gate]: triggers[gate] for gate in manifest.triggers})


def _step(intervention: Intervention, places: Mapping[str, int], gates: Mapping[str, int]) -> Step:
    """One step; `steering_kernels.reference` says what a, b, c and the flags mean to each kind."""
    given = intervention.parameters
    read, write = (-1 if name is None else places[name] for name in (intervention.read, intervention.write))
    step = Step(
        intervention.layer,
        Kind[intervention.kind.upper()],
        read=read,
        write=write,
        gate=-1 if intervention.gate is None else gates[intervention.gate],
        gate_out=-1 if intervention.sets is None else gates[intervention.sets],
        flags=Flag.KEEP_NORM if intervention.keep_norm else Flag(0),
    )
    match intervention.kind:
        case "add" | "add_relative" | "affine":
            return step
        case "project":
            return replace(step, write=read)
        case "clamp":
            low, high = given.minimum, given.maximum
            return replace(step, write=read, a=-math.inf if low is None else low, b=math.inf if high is None else high)
        case "rotate":
            flags = step.flags | (Flag.ABSOLUTE if given.mode == "absolute" else Flag(0))
            return replace(step, write=read, read2=read + 1, write2=read + 1, a=_needed(given.angle), flags=flags)
        case "feature":
            return _feature(step, given)
        case "gated_add" | "condition":
            return _gated(step, given)


def _feature(step: Step, given: Parameters) -> Step:
    assert given.activation is not None and given.edit is not None
    flags = step.flags | _ACTIVATION[given.activation] | _EDIT[given.edit]
    return replace(step, a=given.bias or 0.0, b=given.threshold or 0.0, c=_needed(given.value), flags=flags)


def _gated(step: Step, given: Parameters) -> Step:
    """A step is the sign of b * (p - a), so `below` is a slope of -1."""
    is_step = given.slope is None
    slope = (-1.0 if given.below else 1.0) if given.slope is None else given.slope
    flags = step.flags | (Flag.HARD if is_step else Flag(0)) | (Flag.COSINE if given.cosine else Flag(0))
    return replace(step, a=_needed(given.threshold), b=slope, flags=flags)


def _needed(value: float | None) -> float:
    assert value is not None, "the manifest refuses an intervention without it"
    return value
