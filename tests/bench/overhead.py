"""What steering costs: throughput of plain vLLM, of the idle package, and of a batch in which everybody is steered.

    python tests/bench/overhead.py [--shape qwen2.5-0.5b|lab] [--rounds N] [--eager] [--json FILE]

Two engines live at the same time, one without and one with the package, and take turns of one batch each; only one
works at a time. A round is one batch per mode in random order and then in the reverse order, so that a machine which
slows down or speeds up during a round favours no mode. Every figure is a ratio within rounds; other people's jobs make
the absolute ones meaningless. Both engines get the same environment (`engine.ENVIRONMENT`): the same cores, engine
core and worker in one process (vLLM's separate worker spins for a second after its last step, into the other engine's
turn), and `OMP_WAIT_POLICY=PASSIVE`, so that an idle engine's OpenMP threads sleep instead of spinning.

The exit status is 0 unless nothing could be measured: what is too slow is for the reader to say.
"""

import argparse
import json
import os
import random
import shlex
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import ENVIRONMENT, Engine, EngineError, Mode, Turn, Workload
from ratios import Interval, Samples
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

GOALS = {Mode.IDLE: 0.99, Mode.STEERED: 0.98}
WARM_UP_ROUNDS = 2
LAB_MODEL = Path(__file__).parents[2] / "artifacts/lab/models/target"

QWEN2_5_0_5B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


@dataclass(frozen=True)
class Figures:
    """One mode against plain vLLM. Ratios are mode / plain; p50 and p99 of decode steps and of batches.

    `cpu_time` counts the processor time of the engine process, which other people's jobs disturb less than the clock.
    """

    throughput: Interval
    cpu_time: Interval
    step_p50: Interval
    step_p99: Interval
    tokens_per_s: float
    step_ms: tuple[float, float]
    batch_ms: tuple[float, float]


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    # Leave through the `with` blocks: engines stop and the model's folder goes away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else 120)
    workload = Workload(args.batch, args.input_tokens, args.output_tokens)
    os.environ.update(ENVIRONMENT)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="expertsteer-overhead-") as folder:
        model = LAB_MODEL if args.shape == "lab" else _random_model(Path(folder) / "model")
        try:
            about, turns = _measure(args, model, Path(folder), workload)
        except EngineError as error:
            print(f"overhead: {error}", file=sys.stderr)
            return 1
    settings = {
        "command": f"python tests/bench/overhead.py {shlex.join(sys.argv[1:])}".rstrip(),
        **about,
        "shape": args.shape,
        "workload": f"batch {args.batch}, {args.input_tokens} prompt + {args.output_tokens} generated tokens",
        "steered": f"{args.batch} different vectors and strengths, every layer, every token",
        "mode": "eager" if args.eager else "compiled",
        "rounds": f"{args.rounds} of {2 * len(Mode)} batches, mirrored random order, after {WARM_UP_ROUNDS} to warm up",
        "OpenMP": " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items() if "OMP_" in key),
        "load average": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
    }
    figures = _figures(turns, workload)
    for table in (_settings_table(settings), _figures_table(figures), _times_table(figures)):
        console.print(table)
    if args.json:
        report = {"settings": settings, "figures": {mode: asdict(row) for mode, row in figures.items()}}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of plain vLLM, the idle package and a steered batch.")
    parser.add_argument("--shape", choices=("qwen2.5-0.5b", "lab"), default="qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds (default: 30)")
    parser.add_argument("--batch", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--input-tokens", type=int, default=32, help="prompt tokens per request (default: 32)")
    parser.add_argument("--output-tokens", type=int, default=32, help="generated tokens per request (default: 32)")
    parser.add_argument("--eager", action="store_true", help="both engines without torch.compile and CUDA graphs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and figures as JSON")
    args = parser.parse_args()
    for name, least in (("rounds", 2), ("batch", 1), ("input_tokens", 1), ("output_tokens", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, the least is {least}")
    return args


def _random_model(folder: Path) -> Path:
    """Random weights of the Qwen2.5-0.5B shape, in bf16. Real ones, so that activations have ordinary magnitudes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN2_5_0_5B)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _measure(
    args: argparse.Namespace, model: Path, folder: Path, workload: Workload
) -> tuple[dict[str, str], dict[Mode, list[list[Turn]]]]:
    """Description of the machine, and for each mode two turns per round."""
    order = random.Random(0)
    turns: dict[Mode, list[list[Turn]]] = {mode: [] for mode in Mode}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("start two engines", total=WARM_UP_ROUNDS + args.rounds)
        with (
            Engine(model, folder / "plain.log", workload, steering=False, eager=args.eager) as plain,
            Engine(model, folder / "steering.log", workload, steering=True, eager=args.eager) as steering,
        ):
            engines = {Mode.PLAIN: plain, Mode.IDLE: steering, Mode.STEERED: steering}
            for number in range(WARM_UP_ROUNDS + args.rounds):
                progress.update(task, description="warm up" if number < WARM_UP_ROUNDS else "measure")
                modes = order.sample(list(Mode), len(Mode))
                done: dict[Mode, list[Turn]] = {mode: [] for mode in Mode}
                for mode in (*modes, *reversed(modes)):
                    # Prompts are new in every turn, so that none is in the prefix cache, and the same for all modes.
                    done[mode].append(engines[mode].run(mode, seed=2 * number + len(done[mode])))
                _require_effect(done)
                if number >= WARM_UP_ROUNDS:
                    for mode in Mode:
                        turns[mode].append(done[mode])
                progress.advance(task)
            return steering.about, turns


def _require_effect(done: dict[Mode, list[Turn]]) -> None:
    """A benchmark of steering that does not steer measures nothing."""
    if any(steered.tokens == idle.tokens for steered, idle in zip(done[Mode.STEERED], done[Mode.IDLE], strict=True)):
        raise EngineError("a steered batch generated the same tokens as an unsteered one: steering has no effect")


def _figures(turns: dict[Mode, list[list[Turn]]], workload: Workload) -> dict[Mode, Figures]:
    samples = {mode: Samples.of(rounds) for mode, rounds in turns.items()}
    plain = samples[Mode.PLAIN]
    generated = workload.batch * workload.output_tokens
    return {
        mode: Figures(
            throughput=plain.seconds_over(mine),
            cpu_time=mine.cpu_seconds_over(plain),
            step_p50=mine.step_percentile_over(plain, 50),
            step_p99=mine.step_percentile_over(plain, 99),
            tokens_per_s=generated / mine.batch_percentile(50),
            step_ms=(1e3 * mine.step_percentile(50), 1e3 * mine.step_percentile(99)),
            batch_ms=(1e3 * mine.batch_percentile(50), 1e3 * mine.batch_percentile(99)),
        )
        for mode, mine in samples.items()
    }


def _settings_table(settings: dict[str, Any]) -> Table:
    table = Table(title="Steering overhead", show_header=False)
    for name, value in settings.items():
        table.add_row(name, str(value))
    return table


def _figures_table(figures: dict[Mode, Figures]) -> Table:
    table = Table(
        title="Against plain vLLM: ratio [95 % interval]",
        caption="throughput: more is better; times: less. open: the goal is inside the interval",
    )
    for name in ("", "throughput", "goal", "CPU time", "step p50", "step p99"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for mode, goal in GOALS.items():
        row = figures[mode]
        verdict = _verdict(row.throughput, goal)
        ratios = (row.cpu_time, row.step_p50, row.step_p99)
        table.add_row(mode, str(row.throughput), f">= {goal} {verdict}", *map(str, ratios))
    return table


def _verdict(ratio: Interval, goal: float) -> str:
    if ratio.low >= goal:
        return "met"
    return "missed" if ratio.high < goal else "open"


def _times_table(figures: dict[Mode, Figures]) -> Table:
    table = Table(
        title="For orientation: absolute figures of this run",
        caption="p50 / p99; step: a decode step of the whole batch",
    )
    for name in ("", "generated tokens/s", "step ms", "batch ms"):
        table.add_column(name, justify="right" if name else "left")
    for mode, row in figures.items():
        step, batch = (f"{p50:.1f} / {p99:.1f}" for p50, p99 in (row.step_ms, row.batch_ms))
        table.add_row(mode, f"{row.tokens_per_s:.1f}", step, batch)
    return table


if __name__ == "__main__":
    sys.exit(main())
