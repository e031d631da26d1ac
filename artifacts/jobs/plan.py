"""What a build is going to do, printed before it does it: models, data, choices, and the cost of every step."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from artifacts.evaluation.schema import Settings
from artifacts.jobs.build import Build
from artifacts.jobs.cost import EFFICIENCY, FORMULAE, Workload, bundle_bytes, peak_memory, step_costs
from artifacts.jobs.data import NeutralRow, Question
from artifacts.jobs.device import device_of
from artifacts.jobs.direction import kinds
from artifacts.jobs.measure import MAX_NEUTRAL_TOKENS
from artifacts.jobs.model import load_encoder
from artifacts.jobs.runner import finished_steps
from artifacts.jobs.shape import model_shape
from artifacts.jobs.source import find_model

ROLES = ("expert", "target")
_RATE_SECONDS = 0.3
_RATE_SIDE = 1024
_WIDTH = 120


class Rates(NamedTuple):
    """Floating-point operations per second of a large matrix product: of the models, and of the algebra on states."""

    forward: float
    algebra: float


def print_plan(build: Build, output: Path, rate: float | None = None, console: Console | None = None) -> None:
    """Print the plan of a build.

    Args:
        build: reads its data files and both models' configurations and tokenizers, no weights.
        output: path of the bundle.
        rate: operations per second of the models' matrix products; measured on the build's device if None.
        console: where to print.

    Raises:
        BuildError: a data file or a model's configuration is wrong.
    """
    out = console or Console(stderr=True)
    if not out.is_terminal and console is None:
        out = Console(stderr=True, width=_WIDTH)
    config = build.config
    load = workload_of(build)
    rates = Rates(rate or matmul_rate(config.device, config.dtype), matmul_rate("cpu", "float64"))
    out.print(_choices(build, load, output))
    out.print(_steps(build, load, rates))
    free = shutil.disk_usage(_existing(build.work)).free
    disk = sum(step.disk_bytes for step in step_costs(load))
    out.print(
        f"memory at the worst moment about {_size(peak_memory(load))}; disk {_size(disk)}, {_size(free)} are free; "
        f"the bundle about {_size(bundle_bytes(load))}; "
        f"the models' products run at {rates.forward / 1e9:,.0f} GFLOP/s ({'given' if rate else 'measured here'}), "
        f"the algebra's at {rates.algebra / 1e9:,.0f} (measured here); the times take {EFFICIENCY:.0%} of both",
        soft_wrap=True,
    )
    for line in FORMULAE:
        out.print(f"  {line}", style="dim", soft_wrap=True)


def matmul_rate(device: str, dtype: str) -> float:
    """Floating-point operations per second of a 1024 x 1024 matrix product on the device that a build would use."""
    place = device_of(device)
    side = torch.randn(_RATE_SIDE, _RATE_SIDE, device=place, dtype=getattr(torch, dtype))
    _ = float((side @ side)[0, 0])
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _RATE_SECONDS:
        # Reading a value waits for the device.
        _ = float((side @ side)[0, 0])
        count += 1
    return count * 2 * _RATE_SIDE**3 / (time.perf_counter() - started)


def workload_of(build: Build) -> Workload:
    """Rows, tokens and sizes of a build, from its data files and both models' configurations and tokenizers."""
    config = build.config
    directories = {role: find_model(getattr(config, role), build.root, weights=False).directory for role in ROLES}
    expert, target = (load_encoder(getattr(config, role).model, directories[role]) for role in ROLES)
    shapes = {role: model_shape(getattr(config, role).model, directories[role], config.dtype) for role in ROLES}
    captured = [*build.contrast, *build.mapping]
    neutral = build.rows("neutral", NeutralRow)

    def examined(split: str) -> int:
        questions = [*build.rows(split, Question), *build.retention(split)]
        answered = sum(len(target.encode_answered(row)) for row in questions)
        texts = [len(target.encode(row).ids) for row in neutral if row.split == split]
        return answered + sum(min(length, MAX_NEUTRAL_TOKENS) for length in texts)

    return Workload(
        expert=shapes["expert"],
        target=shapes["target"],
        expert_layers=_count(config.layers.expert, shapes["expert"].num_layers),
        target_layers=_count(config.layers.target, shapes["target"].num_layers),
        contrast_rows=len(build.contrast),
        mapping_rows=len(build.mapping),
        expert_tokens=sum(len(expert.encode(row).ids) for row in captured),
        target_tokens=sum(len(target.encode(row).ids) for row in captured),
        tune_tokens=examined("tune"),
        test_tokens=examined("test"),
        asked_tokens=sum(len(target.encode_answered(row)) for row in build.rows("test", Question)),
        storage_dtype=config.capture.storage_dtype,
        batch_tokens=config.batch_tokens,
        align_rank=config.align.max_components,
        align_permutations=config.align.permutations,
        information_components=config.pairing.components,
        information_permutations=config.pairing.permutations,
        tries_all_pairs=config.pairing.method == "held-out",
        pair_strengths=len(config.pairing.strengths),
        shortlist=max(config.pairing.shortlist, config.pairing.pairs),
        pairs=config.pairing.pairs,
        maps=config.align.method != "labeller",
        kinds=len(kinds(build)),
        finalists=max(config.tune.finalists, config.pairing.pairs),
        strengths=len(config.tune.strengths),
        doses=Settings().doses,
        rfm_components=config.vectors.components,
        rfm_iterations=config.vectors.iterations,
        resamples=config.vectors.resamples,
        chance_controls=2 * config.evaluate.control_draws,
        random_directions=config.evaluate.random_directions,
    )


def _choices(build: Build, load: Workload, output: Path) -> Table:
    config = build.config
    table = Table(title=f"Build {config.name} -> {output}", title_justify="left", show_header=False)
    for role, source, shape in (("target", config.target, load.target), ("expert", config.expert, load.expert)):
        name = source.id or source.model
        table.add_row(
            role,
            f"{name}: {shape.parameters / 1e6:,.1f} M parameters, {shape.num_layers} layers of {shape.hidden_size}, "
            f"{config.dtype}",
        )
    texts = "other prompts than the direction" if config.align.prompts == "other" else "the direction's own prompts"
    table.add_row(
        "data", f"{load.contrast_rows} contrast and {load.mapping_rows} mapping rows, read at {config.data.position}"
    )
    table.add_row("align", f"{config.align.method}, fitted on {texts}")
    table.add_row(
        "pair", f"{config.pairing.method}, {config.pairing.pairs} of {load.expert_layers * load.target_layers}"
    )
    table.add_row("vectors", ", ".join(kind.name for kind in kinds(build)))
    table.add_row(
        "tune",
        f"{config.tune.objective}, perplexity up to x{config.tune.perplexity_budget:g}, retention down to "
        f"{1 - config.tune.retention_budget:.0%}",
    )
    return table


def _steps(build: Build, load: Workload, rates: Rates) -> Table:
    table = Table(title_justify="left")
    for name in ("step", "work", "TFLOP", "time", "disk", ""):
        table.add_column(name, justify="right" if name in ("TFLOP", "time", "disk") else "left")
    finished = finished_steps(build)
    total = 0.0
    for step in step_costs(load):
        seconds = (
            0.0 if step.name in finished else (step.forward / rates.forward + step.algebra / rates.algebra) / EFFICIENCY
        )
        total += seconds
        table.add_row(
            step.name,
            step.what,
            f"{(step.forward + step.algebra) / 1e12:,.2f}",
            _duration(seconds),
            _size(step.disk_bytes) if step.disk_bytes else "",
            "finished" if step.name in finished else "",
        )
    table.add_row("all", "", "", _duration(total), "", "")
    return table


def _count(choice: object, num_layers: int) -> int:
    return num_layers if choice == "all" else len(set(choice))  # type: ignore[call-overload]


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
