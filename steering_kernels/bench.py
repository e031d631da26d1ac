"""What the operators cost: time, share of the copy bandwidth, and ratios to a plain residual add + RMSNorm.

    python -m steering_kernels.bench [--device cpu|cuda] [--dtype bfloat16] [--backends cuda,triton] [--tokens 1,2048]
        [--hidden 1024,4096] [--kinds add,rank-4] [--rounds N] [--quick] [--vllm-ops] [--json FILE]

Everything that is compared takes turns within a round, in random order, and every figure but times and rates is a ratio
within rounds: a machine which slows down or speeds up favours nobody. On CUDA the calls are replayed from a CUDA graph
over buffers that together exceed the L2 cache; on the host the buffers of one call are used again and again, as warm as
their size allows, and the time includes the call from Python.

Rows of a table:
    plain       residual add + RMSNorm of torch or vLLM, without steering
    fused       steer_add_rms_norm_; with slots -1 it is the plain operation of the same backend
    in place    steer_; with slots -1 it has nothing to do
    copy        of as many bytes as fused, or in place, moves; its bandwidth is 100 %
    launch      the smallest call: adding to one number

Column "/ own": fused relative to fused with slots -1 of the same backend, in place with slots -1 relative to launch.

Slots: -1 for every token; one for all; 256, each with its own rows, in turn. rank-4 is a condition and what it gates, a
clamp and a rotation. Bytes are those of the rows that must be read and written at least once, the pool's included.

Goals from 2048 tokens up: fused add at most 1.02 and fused rank-4 at most 1.10 of vLLM's plain operation (of the
backend's own without --vllm-ops), and on CUDA at least 90 % of the copy bandwidth. At every size: in place with slots
-1 takes at most a launch. The exit status is 0 unless nothing could be measured: what is too slow is for the reader to
say.
"""

import argparse
import importlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch

from steering_kernels import backends
from steering_kernels.timing import Interval, Samples, Work, interleaved, num_turns
from steering_kernels.workload import FUSED_IDLE, KINDS, Shape, Variant, Workload

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEFAULT_KINDS = ("add", "project", "rank-4")
# Below, a call is all latency.
_LARGE_TOKENS = 2048
_FUSED_GOALS = {"add": 1.02, "rank-4": 1.10}
_BANDWIDTH_GOAL, _LAUNCH_GOAL = 0.90, 1.0


@dataclass(frozen=True)
class Row:
    """Figures of one variant.

    Attributes:
        microseconds: median, lower and upper quartile over rounds, per call.
        gigabytes_per_s: bytes over the median time; None where nothing has to be moved.
        copy_share: the same relative to the copy of that form.
        over_own: time relative to the backend's own fused with slots -1; for in place with slots -1, to launch.
        over_plain: time relative to each plain operation, by name.
        verdicts: goals, and whether the interval is on their good side (met), on the other (missed) or holds them
            (open).
    """

    name: str
    microseconds: tuple[float, float, float]
    gigabytes_per_s: float | None = None
    copy_share: Interval | None = None
    over_own: Interval | None = None
    over_plain: Mapping[str, Interval] = field(default_factory=dict)
    verdicts: Sequence[str] = ()


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    load_before = os.getloadavg()[0]
    try:
        modules = _modules(args)
        if args.vllm_ops:
            importlib.import_module("vllm.platforms").current_platform.import_kernels()
        tables = _measure(args, modules)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    settings = _settings(args, load_before)
    _print(settings, tables)
    if args.json:
        report = {
            "settings": settings,
            "tables": [where | {"rows": [asdict(row) for row in rows]} for where, rows in tables],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m steering_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    names = ", ".join(KINDS)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--backends", type=_words, help="comma-separated (default: all of the device but reference)")
    parser.add_argument("--tokens", type=_numbers, default=[1, 16, 256, 2048, 8192], help="default: 1,16,256,2048,8192")
    parser.add_argument("--hidden", type=_numbers, default=[1024, 4096, 8192], help="default: 1024,4096,8192")
    parser.add_argument(
        "--kinds",
        type=_words,
        default=list(_DEFAULT_KINDS),
        help=f"all, or some of {names} (default: add,project,rank-4)",
    )
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds (default: 30)")
    parser.add_argument("--turn-ms", type=float, default=3.0, help="milliseconds of one turn of a variant (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tokens 1,2048; hidden 1024; 10 rounds of 1 ms turns")
    parser.add_argument("--vllm-ops", action="store_true", help="compare with vLLM's fused_add_rms_norm as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and figures as JSON")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.hidden, args.rounds, args.turn_ms = [1, 2048], [1024], 10, 1.0
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda, but torch finds no CUDA device here")
    if args.kinds == ["all"]:
        args.kinds = list(KINDS)
    for kind in args.kinds:
        if kind not in KINDS:
            parser.error(f"--kinds has {kind!r}, known are {names}")
    if min([*args.tokens, *args.hidden, args.rounds - 1]) < 1 or args.turn_ms <= 0:
        parser.error("--tokens, --hidden and --turn-ms must be above 0, --rounds above 1")
    return args


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _modules(args: argparse.Namespace) -> dict[str, ModuleType]:
    """Backends to measure, by name.

    Raises:
        ValueError: one that was asked for does not run here.
    """
    found = backends.available(args.device, _DTYPES[args.dtype])
    wanted = args.backends or [name for name in found if name != "reference"] or ["reference"]
    for name in wanted:
        if name not in found:
            raise ValueError(f"no backend {name!r} for {args.dtype} on {args.device}; available: {', '.join(found)}")
    return {name: found[name] for name in wanted}


def _measure(args: argparse.Namespace, modules: dict[str, ModuleType]) -> list[tuple[dict[str, int], list[Row]]]:
    """For each hidden size and number of tokens: where it was measured, and the figures."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tables = []
    shapes = [
        Shape(tokens, hidden, _DTYPES[args.dtype], args.device) for hidden in args.hidden for tokens in args.tokens
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        for index, shape in enumerate(shapes):
            where = {"hidden_size": shape.hidden_size, "num_tokens": shape.num_tokens}
            progress.update(task, description=f"{shape.num_tokens} x {shape.hidden_size}")
            workload = Workload(shape, args.kinds, args.vllm_ops)
            for name, module in modules.items():
                workload.require_effect(name, module)
            works = workload.works(modules)
            turns = num_turns(len(works), args.rounds)
            progress.update(task, total=turns * len(shapes), completed=turns * index)
            samples = interleaved(works, args.device, args.rounds, args.turn_ms / 1e3, lambda: progress.advance(task))
            tables.append((where, _rows(workload, works, samples, list(modules))))
    return tables


def _rows(workload: Workload, works: dict[str, Work], samples: dict[str, Samples], names: list[str]) -> list[Row]:
    """Figures of everything that took turns, in the order of the table."""
    variants = {f"{name} {variant}": (name, variant) for name in names for variant in workload.variants}
    return [_row(key, work, samples, workload, *variants.get(key, (None, None))) for key, work in works.items()]


def _row(
    key: str,
    work: Work,
    samples: dict[str, Samples],
    workload: Workload,
    backend: str | None,
    variant: Variant | None,
) -> Row:
    sample = samples[key]
    low, median, high = (1e6 * seconds for seconds in sample.quartiles())
    rate = work.moved_bytes / median / 1e3 if work.moved_bytes else None
    row = Row(key, (median, low, high), rate)
    if variant is None and key not in workload.plain:
        return row
    fused = variant is None or variant.fused
    copied = (4 if fused else 2) * workload.shape.num_tokens * workload.shape.row_bytes
    copy = samples["copy, fused's bytes" if fused else "copy, in place's bytes"]
    share = copy.over(sample).times(work.moved_bytes / copied) if work.moved_bytes else None
    plain = {name: sample.over(samples[name]) for name in workload.plain} if fused else {}
    row = replace(row, copy_share=share, over_plain=plain)
    if variant is None:
        return row
    if not fused and variant.slots != "none":
        return row
    own = sample.over(samples[f"{backend} {FUSED_IDLE}" if fused else "launch"])
    return replace(row, over_own=own, verdicts=_verdicts(workload.shape, variant, plain.get("plain vLLM", own), share))


def _verdicts(shape: Shape, variant: Variant, ratio: Interval, share: Interval | None) -> list[str]:
    """`ratio` is to the plain operation for fused, to launch for in place."""
    if not variant.fused:
        return [ratio.at_most(_LAUNCH_GOAL)]
    if shape.num_tokens < _LARGE_TOKENS:
        return []
    goal = None if variant.slots == "none" else _FUSED_GOALS.get(variant.kind)
    verdicts = [] if goal is None else [ratio.at_most(goal)]
    if shape.device == "cuda" and share is not None:
        verdicts.append(share.at_least(_BANDWIDTH_GOAL))
    return verdicts


def _settings(args: argparse.Namespace, load_before: float) -> dict[str, str]:
    return {
        "command": f"python -m steering_kernels.bench {shlex.join(sys.argv[1:])}".rstrip(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else _processor(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "rounds": f"{args.rounds}, turns of about {args.turn_ms:g} ms, or of three calls where those take longer",
        "load average": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _print(settings: dict[str, str], tables: list[tuple[dict[str, int], list[Row]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 190)
    about = Table(title="Cost of the steering operators", show_header=False)
    for name, value in settings.items():
        about.add_row(name, value)
    console.print(about)
    for where, rows in tables:
        plain = list(rows[0].over_plain)
        table = Table(
            title=f"{where['num_tokens']} tokens, hidden size {where['hidden_size']}",
            caption="us: median (quartiles); ratios of times (95 % interval); open: the goal is inside the interval",
        )
        for name in ("", "us", "GB/s", "/ copy", "/ own", *(f"/ {name}" for name in plain), "goals"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for row in rows:
            median, low, high = row.microseconds
            table.add_row(
                row.name,
                " ".join([_short(median), f"({_short(low)}, {_short(high)})"]),
                "" if row.gigabytes_per_s is None else f"{row.gigabytes_per_s:.1f}",
                str(row.copy_share or ""),
                str(row.over_own or ""),
                *(str(row.over_plain.get(name, "")) for name in plain),
                ", ".join(row.verdicts),
            )
        console.print(table)


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


if __name__ == "__main__":
    sys.exit(main())
