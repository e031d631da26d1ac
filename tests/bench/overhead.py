"""What steering costs: throughput of plain vLLM, of the idle package, and of a batch in which everybody is steered.

    python tests/bench/overhead.py [--shape qwen2.5-0.5b|lab] [--starts N] [--rounds N] [--eager] [--json FILE]

Two engines live at the same time, one without and one with the package, and take turns of one batch each; only one
works at a time. A round is one batch per mode in random order and then in the reverse order, so that a machine which
slows down or speeds up during a round favours no mode. Every figure is a ratio within rounds; other people's jobs make
the absolute ones meaningless. Both engines get the same environment (`engine.ENVIRONMENT`): the same cores, engine
core and worker in one process (vLLM's separate worker spins for a second after its last step, into the other engine's
turn), and `OMP_WAIT_POLICY=PASSIVE`, so that an idle engine's OpenMP threads sleep instead of spinning.

Two processes of the same code differ by up to 3 % on a CPU for as long as they live, because of where their memory
lies. Both engines are therefore started several times, in alternating order, and the intervals include that spread.
The comparison of `steered` with `idle` is free of it: these two are turns of one process.

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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import ENVIRONMENT, Engine, EngineError, Mode, Turn, Workload
from ratios import Interval, Samples
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

WARM_UP_ROUNDS = 1
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


# What is compared with what, and the goal for the throughput.
COMPARISONS = (
    (Mode.IDLE, Mode.PLAIN, 0.99),
    (Mode.STEERED, Mode.PLAIN, 0.98),
    (Mode.STEERED, Mode.IDLE, None),
)


@dataclass(frozen=True)
class Comparison:
    """Ratios of one mode to another. Steps are decode steps of the whole batch.

    `cpu_time` counts the processor time of the engine process, which other people's jobs disturb less than the clock.
    """

    mode: Mode
    reference: Mode
    goal: float | None
    throughput: Interval
    cpu_time: Interval
    step_p50: Interval
    step_p99: Interval

    @property
    def verdict(self) -> str:
        """Whether the interval is above or below the goal, or holds it."""
        if self.goal is None:
            return ""
        if self.throughput.low >= self.goal:
            return f">= {self.goal} met"
        return f">= {self.goal} {'missed' if self.throughput.high < self.goal else 'open'}"


@dataclass(frozen=True)
class Times:
    """Absolute figures of one mode; pairs are p50 and p99."""

    mode: Mode
    tokens_per_s: float
    step_ms: tuple[float, float]
    batch_ms: tuple[float, float]


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    # Leave through the `with` blocks: engines stop and the model's folder goes away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else 132)
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
        "rounds": f"{args.starts} starts of both engines, {args.rounds} rounds each, {2 * len(Mode)} batches a round",
        "OpenMP": " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items() if "OMP_" in key),
        "load average": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after (the benchmark itself is about 2)",
    }
    samples = {mode: Samples.of(starts) for mode, starts in turns.items()}
    comparisons = [_compare(samples, *comparison) for comparison in COMPARISONS]
    times = [_times(mode, samples[mode], workload) for mode in Mode]
    for table in (_settings_table(settings), _comparisons_table(comparisons), _times_table(times)):
        console.print(table)
    if args.json:
        report = {
            "settings": settings,
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "times": [asdict(row) for row in times],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of plain vLLM, the idle package and a steered batch.")
    parser.add_argument("--shape", choices=("qwen2.5-0.5b", "lab"), default="qwen2.5-0.5b")
    parser.add_argument("--starts", type=int, default=4, help="starts of both engines; best even (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds per start (default: 10)")
    parser.add_argument("--batch", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--input-tokens", type=int, default=32, help="prompt tokens per request (default: 32)")
    parser.add_argument("--output-tokens", type=int, default=32, help="generated tokens per request (default: 32)")
    parser.add_argument("--eager", action="store_true", help="both engines without torch.compile and CUDA graphs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and figures as JSON")
    args = parser.parse_args()
    for name, least in (("starts", 1), ("rounds", 2), ("batch", 1), ("input_tokens", 1), ("output_tokens", 2)):
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
) -> tuple[dict[str, str], dict[Mode, list[list[list[Turn]]]]]:
    """Description of the machine, and for each mode, start and round two turns."""
    order = random.Random(0)
    turns: dict[Mode, list[list[list[Turn]]]] = {mode: [] for mode in Mode}
    about: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.starts * (WARM_UP_ROUNDS + args.rounds))
        for start in range(args.starts):
            progress.update(task, description=f"start {start + 1} of {args.starts}")
            with ExitStack() as stack:
                engines = {}
                for steering in (start % 2 == 1, start % 2 == 0):
                    log = folder / f"{'steering' if steering else 'plain'}.log"
                    engine = Engine(model, log, workload, steering=steering, eager=args.eager)
                    engines[steering] = stack.enter_context(engine)
                about = engines[True].about
                rounds = []
                for _ in range(WARM_UP_ROUNDS + args.rounds):
                    rounds.append(_round(engines, order))
                    progress.advance(task)
            for mode in Mode:
                turns[mode].append([done[mode] for done in rounds[WARM_UP_ROUNDS:]])
    return about, turns


def _round(engines: dict[bool, Engine], order: random.Random) -> dict[Mode, list[Turn]]:
    """Every mode once in random order, then once in the reverse order."""
    modes = order.sample(list(Mode), len(Mode))
    # Prompts are new in every turn, so that none is in the prefix cache, and the same for all modes.
    seed = order.getrandbits(32)
    done: dict[Mode, list[Turn]] = {mode: [] for mode in Mode}
    for mode in (*modes, *reversed(modes)):
        done[mode].append(engines[mode is not Mode.PLAIN].run(mode, seed + len(done[mode])))
    _require_effect(done)
    return done


def _require_effect(done: dict[Mode, list[Turn]]) -> None:
    """A benchmark of steering that does not steer measures nothing."""
    if any(steered.tokens == idle.tokens for steered, idle in zip(done[Mode.STEERED], done[Mode.IDLE], strict=True)):
        raise EngineError("a steered batch generated the same tokens as an unsteered one: steering has no effect")


def _compare(samples: dict[Mode, Samples], mode: Mode, reference: Mode, goal: float | None) -> Comparison:
    ours, theirs = samples[mode], samples[reference]
    return Comparison(
        mode,
        reference,
        goal,
        throughput=theirs.seconds_over(ours),
        cpu_time=ours.cpu_seconds_over(theirs),
        step_p50=ours.step_percentile_over(theirs, 50),
        step_p99=ours.step_percentile_over(theirs, 99),
    )


def _times(mode: Mode, samples: Samples, workload: Workload) -> Times:
    return Times(
        mode,
        tokens_per_s=workload.batch * workload.output_tokens / samples.batch_percentile(50),
        step_ms=(1e3 * samples.step_percentile(50), 1e3 * samples.step_percentile(99)),
        batch_ms=(1e3 * samples.batch_percentile(50), 1e3 * samples.batch_percentile(99)),
    )


def _settings_table(settings: dict[str, str]) -> Table:
    table = Table(title="Steering overhead", show_header=False)
    for name, value in settings.items():
        table.add_row(name, value)
    return table


def _comparisons_table(comparisons: list[Comparison]) -> Table:
    caption = "throughput: more is better; times: less. open: the goal is inside the interval"
    table = Table(title="Ratio [95 % interval]", caption=caption)
    for name in ("", "throughput", "goal", "CPU time", "step p50", "step p99"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in comparisons:
        ratios = (row.cpu_time, row.step_p50, row.step_p99)
        table.add_row(f"{row.mode} / {row.reference}", str(row.throughput), row.verdict, *map(str, ratios))
    return table


def _times_table(times: list[Times]) -> Table:
    caption = "p50 / p99; step: a decode step of the whole batch"
    table = Table(title="For orientation: absolute figures of this run", caption=caption)
    for name in ("", "generated tokens/s", "step ms", "batch ms"):
        table.add_column(name, justify="right" if name else "left")
    for row in times:
        step, batch = (f"{p50:.1f} / {p99:.1f}" for p50, p99 in (row.step_ms, row.batch_ms))
        table.add_row(row.mode, f"{row.tokens_per_s:.1f}", step, batch)
    return table


if __name__ == "__main__":
    sys.exit(main())
