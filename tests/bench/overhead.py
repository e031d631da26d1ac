"""What steering costs: latency and throughput of plain vLLM, of the idle package, and of steered batches.

    python tests/bench/overhead.py [--shape qwen2.5-0.5b|llama-8b|lab] [--kind add|general] [--fusion auto|always|never]
                                   [--mode default|no-graphs|eager] [--workloads 8x32+32,...] [--json FILE]

Two engines live at the same time, one without and one with the package, and take turns of one batch each; only one
works at a time. A round is, for every workload, one batch per variant in random order and then in the reverse order, so
that a machine which slows down or speeds up meanwhile favours no variant. Every figure is a ratio within rounds; other
people's jobs make the absolute ones meaningless. Both engines get the same environment (`engine.environment`): the same
cores, engine core and worker in one process, and on a CPU `OMP_WAIT_POLICY=PASSIVE`, so that an idle engine's OpenMP
threads sleep instead of spinning.

Two processes of the same code differ by up to 3 % on a CPU for as long as they live, because of where their memory
lies. Both engines are therefore started several times, in alternating order, and the intervals include that spread.
Comparisons of steered batches with each other and with the idle package are free of it: these are turns of one process.

Whether steering stays as fast with many resident bundles, of which every request draws one, and with many different
bundles in a batch is measured with the last workload.

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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from blocks import Block, distinct_block, overhead_block, resident_block
from engine import COMPILATIONS, Engine, EngineError, Options, Package, environment
from ratios import Samples
from report import compare, latency_table, settings_table, throughput_table, times_of, times_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shapes import SHAPES, model_of
from turn import Turn, Workload

WARM_UP_ROUNDS = 1
# Throughput over plain vLLM's, idle and steered, by device.
GOALS = {"cpu": (0.995, 0.98), "cuda": (0.998, 0.99)}

# One list of turns per round, by variant.
Rounds = dict[str, list[list[Turn]]]


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    # Leave through the `with` blocks: engines stop and the model's folder goes away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device_type = _device_type()
    variables = environment(device_type)
    os.environ.update(variables)
    blocks = _blocks(args, GOALS[device_type])
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="expertsteer-overhead-") as folder:
        try:
            about, starts = _measure(args, blocks, Path(folder))
        except EngineError as error:
            print(f"overhead: {error}", file=sys.stderr)
            return 1
    settings = {
        "command": f"python tests/bench/overhead.py {shlex.join(sys.argv[1:])}".rstrip(),
        **about,
        **_settings(args),
        "environment": " ".join(f"{key}={value}" for key, value in variables.items() if "OMP_" in key or "V2" in key),
        "load average": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
    }
    _report(settings, blocks, starts, args.json)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Latency and throughput of plain vLLM, the idle package and steered batches.",
        epilog="The defaults take about 25 minutes on two CPU cores; time grows with starts x (rounds + 1).",
    )
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--kind", choices=("add", "general"), default="add", help="of the bundles; general is rank 4")
    parser.add_argument("--fusion", choices=("auto", "always", "never"), default="auto", help="as the server's option")
    parser.add_argument("--mode", choices=tuple(COMPILATIONS), default="default", help="what vLLM compiles")
    parser.add_argument(
        "--workloads",
        type=_workloads,
        default="1x32+16,8x128+16,32x16+8",
        help="requests at a time x prompt tokens + generated tokens (default: %(default)s)",
    )
    counts = {"type": lambda text: [int(one) for one in text.split(",") if one], "metavar": "N,N"}
    parser.add_argument("--resident", default="1,1000", **counts, help="resident bundles (default: %(default)s)")
    parser.add_argument("--distinct", default="1,8,32", **counts, help="bundles in a batch (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=4, help="starts of both engines; best even (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds per start (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and figures as JSON")
    args = parser.parse_args()
    largest = args.workloads[-1].batch
    for wrong, message in (
        (args.starts < 1, f"--starts is {args.starts}, the least is 1"),
        (args.rounds < 2, f"--rounds is {args.rounds}, the least is 2"),
        (min([1, *args.resident, *args.distinct]) < 1, "--resident and --distinct count from 1"),
        (max([0, *args.distinct]) > largest, f"--distinct is more than the last workload has requests, {largest}"),
    ):
        if wrong:
            parser.error(message)
    return args


def _workloads(text: str) -> list[Workload]:
    try:
        return [Workload.of(one) for one in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _blocks(args: argparse.Namespace, goals: tuple[float, float]) -> list[Block]:
    resident = _resident(args.workloads)
    blocks = [overhead_block(workload, resident, goals) for workload in args.workloads]
    # One count has nothing to be compared with.
    if len(args.distinct) > 1:
        blocks.append(distinct_block(args.workloads[-1], args.distinct, resident))
    if len(args.resident) > 1:
        blocks.append(resident_block(args.workloads[-1], args.resident))
    return blocks


def _resident(workloads: Sequence[Workload]) -> int:
    """Bundles that are resident unless more or fewer are what is measured: one for every request of a batch."""
    return max(workload.batch for workload in workloads)


def _settings(args: argparse.Namespace) -> dict[str, str]:
    return {
        "shape": f"{args.shape}, mode {args.mode}",
        "bundles": f"{args.kind} at every layer, for every token; {_resident(args.workloads)} resident unless said",
        "steered": "a bundle of its own and another strength per request",
        "resident": "every request draws one of them",
        "rounds": f"{args.starts} starts of both engines, {args.rounds} rounds each, every variant twice a round",
    }


def _measure(
    args: argparse.Namespace, blocks: Sequence[Block], folder: Path
) -> tuple[dict[str, str], list[list[Rounds]]]:
    """Description of the machine, and for each start and block the turns of its variants."""
    model = model_of(args.shape, folder / "model")
    max_model_len = max(workload.input_tokens + workload.output_tokens for workload in args.workloads)
    package = Package(args.kind, args.fusion, max([_resident(args.workloads), *args.resident]))
    order = random.Random(0)
    starts = []
    about: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.starts * (WARM_UP_ROUNDS + args.rounds))
        for start in range(args.starts):
            progress.update(task, description=f"start {start + 1} of {args.starts}")
            with ExitStack() as stack:
                engines = {}
                for steering in (start % 2 == 1, start % 2 == 0):
                    options = Options(model, max_model_len, args.mode, package if steering else None)
                    log = folder / f"{'steering' if steering else 'plain'}.log"
                    engines[steering] = stack.enter_context(Engine(options, log))
                about = engines[True].about
                done: list[Rounds] = [{variant.name: [] for variant in block.variants} for block in blocks]
                for number in range(WARM_UP_ROUNDS + args.rounds):
                    for block, rounds in zip(blocks, done, strict=True):
                        for name, turns in _round(engines, block, order).items():
                            rounds[name] += [turns] if number >= WARM_UP_ROUNDS else []
                    progress.advance(task)
            starts.append(done)
    return about, starts


def _round(engines: dict[bool, Engine], block: Block, order: random.Random) -> dict[str, list[Turn]]:
    """Every variant once in random order, then once in the reverse order."""
    variants = order.sample(block.variants, len(block.variants))
    # Prompts are new in every turn, so that none is in the prefix cache, and the same for all variants.
    seed = order.getrandbits(32)
    done: dict[str, list[Turn]] = {variant.name: [] for variant in block.variants}
    for number, turns in enumerate((variants, variants[::-1])):
        for variant in turns:
            turn = engines[variant.package].run(variant.batch(block.workload, seed + number))
            done[variant.name].append(turn)
        _require_effect(block, seed + number, {name: turns[number] for name, turns in done.items()})
    return done


def _require_effect(block: Block, seed: int, turns: dict[str, Turn]) -> None:
    """A benchmark of steering that does not steer measures nothing."""
    for one, other in combinations(block.variants, 2):
        differ = one.batch(block.workload, seed).bundles != other.batch(block.workload, seed).bundles
        if differ and turns[one.name].tokens == turns[other.name].tokens:
            raise EngineError(f"{one.name} and {other.name} generated the same tokens: steering has no effect")


def _report(
    settings: dict[str, str], blocks: Sequence[Block], starts: list[list[Rounds]], json_file: Path | None
) -> None:
    comparisons, times = [], []
    for number, block in enumerate(blocks):
        samples = {
            variant.name: Samples.of([start[number][variant.name] for start in starts]) for variant in block.variants
        }
        comparisons += compare(block, samples)
        times += [times_of(block.workload, name, of_variant) for name, of_variant in samples.items()]
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in (
        settings_table(settings),
        throughput_table(comparisons),
        latency_table(comparisons),
        times_table(times),
    ):
        console.print(table)
    if json_file is not None:
        report = {
            "settings": settings,
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "times": [asdict(row) for row in times],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
