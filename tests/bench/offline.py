"""How long the offline jobs take, against their goals on two cores.

    python tests/bench/offline.py [--only bundle rfm information capture] [--rounds N] [--json FILE]

bundle       the shipped demo bundle from nothing but the two lab models, recommended preset, as a user runs it
rfm          one Recursive Feature Machine: 2000 rows of width 4096 through 64 whitened components, 5 iterations
information  mutual information of 32 x 32 layers: 1000 rows of width 4096, 50 components, 100 permutations
capture      states of every layer written to disk, over the bare forward pass on the same batches; turns alternate, and
             the figure is the median of the ratios within rounds

The exit status is 0 unless something could not be measured: whether a figure over its goal is the fault of the code or
of a busy machine is for the reader to say. For that, processor seconds of all threads stand beside; threads that wait
for others spin at first and count, which `OMP_WAIT_POLICY=PASSIVE` prevents.
"""

import argparse
import json
import os
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from ratios import Samples
from torch import Tensor

from artifacts.jobs.data import Text
from artifacts.jobs.model import CausalModel, batches, load_model, pad
from artifacts.jobs.states import capture_states
from artifacts.pairing.information import layer_information, whiten_layer
from artifacts.vectors.rfm import fit_rfm

LAB = Path(__file__).parents[2] / "artifacts/lab"
BUILD_TIMEOUT_S = 1200.0

WIDTH = 4096
RFM_ROWS, RFM_HELD, RFM_COMPONENTS, RFM_ITERATIONS = 2000, 400, 64, 5
MI_LAYERS, MI_ROWS, MI_COMPONENTS, MI_PERMUTATIONS = 32, 1000, 50, 100
# Width and proportions of Qwen2.5-0.5B with fewer layers and the lab's small vocabulary: a turn takes some seconds.
CAPTURE_SHAPE = {
    "hidden_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
CAPTURE_ROWS, CAPTURE_WORDS, BATCH_TOKENS = 32, 48, 1024


class BenchmarkError(RuntimeError):
    """Something could not be measured."""


@dataclass(frozen=True)
class Result:
    """One line of the benchmark.

    Attributes:
        value: seconds, or a ratio of times.
        goal: `value` should not exceed it.
        unit: " s" or "".
        note: what else was seen.
    """

    name: str
    value: float
    goal: float
    unit: str
    note: str

    def __str__(self) -> str:
        verdict = "PASS" if self.value <= self.goal else "over"
        digits = 1 if self.unit else 3
        measured, goal = f"{self.value:.{digits}f}{self.unit}", f"{self.goal:g}{self.unit}"
        return f"{self.name:<12} {measured:>9}   goal <= {goal:<6}  {verdict}   {self.note}"


@dataclass(frozen=True)
class Turn:
    """Times of one turn of the capture benchmark; it has no decode steps."""

    seconds: float
    cpu_seconds: float
    decode_seconds: tuple[float, ...] = ()


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    load_before = os.getloadavg()[0]
    settings = {
        "command": f"python tests/bench/offline.py {shlex.join(sys.argv[1:])}".rstrip(),
        "cores": f"{len(os.sched_getaffinity(0))}, torch uses {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "xrfm", "scikit-learn", "expertsteer")),
        "load average": f"{load_before:.1f} before",
    }
    for name, value in settings.items():
        print(f"# {name}: {value}")
    results = []
    try:
        for name in args.only:
            results.append(MEASUREMENTS[name](args.rounds))
            print(results[-1], flush=True)
    except BenchmarkError as error:
        print(f"offline: {error}", file=sys.stderr)
        return 1
    if args.json:
        report = {"settings": settings, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long the offline jobs take, against their goals on two cores.")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(MEASUREMENTS), default=tuple(MEASUREMENTS), help="default: all four"
    )
    parser.add_argument("--rounds", type=int, default=6, help="of `capture`, four turns each (default: 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and figures as JSON")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}, the least is 2")
    return args


def _bundle(_rounds: int) -> Result:
    """The command of a user, the start of Python and the loading of models included."""
    with tempfile.TemporaryDirectory(prefix="expertsteer-offline-") as folder:
        output = Path(folder) / "careful.safetensors"
        command = [sys.executable, "-m", "server.cli", "build", str(LAB / "careful.yaml"), "-o", str(output)]
        command += ["--preset", "recommended", "--work", str(Path(folder) / "work"), "--quiet"]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the build did not end within {BUILD_TIMEOUT_S:.0f} s") from error
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        if not output.is_file():
            raise BenchmarkError(f"the build ended with {done.returncode} and no bundle: {done.stderr.strip()[-2000:]}")
        note = f"{usage.ru_utime + usage.ru_stime:.1f} s of processor; lab bundle, recommended preset"
    return Result("bundle", seconds, 90, " s", note)


def _rfm(_rounds: int) -> Result:
    states, concept = _layer(RFM_ROWS + RFM_HELD, 0)
    labels = (concept > 0).long()
    fit, held = slice(None, RFM_ROWS), slice(RFM_ROWS, None)
    # The first fit in a process also loads the package and starts the threads.
    fit_rfm(states[:200], labels[:200], states[held], labels[held], RFM_COMPONENTS, 1, 0)

    def one() -> None:
        fit_rfm(states[fit], labels[fit], states[held], labels[held], RFM_COMPONENTS, RFM_ITERATIONS, 0)

    turn = min((_timed(one) for _ in range(3)), key=lambda each: each.seconds)
    note = (
        f"{turn.cpu_seconds:.1f} s of processor; best of 3, {RFM_ROWS} x {WIDTH} through {RFM_COMPONENTS} components, "
        "whitening included"
    )
    return Result("rfm", turn.seconds, 3, " s", note)


def _information(_rounds: int) -> Result:
    whitened: list[Tensor] = []
    turns = []
    for seed in range(2 * MI_LAYERS):
        # Drawn layer by layer, as a job reads them: all at once would take a gigabyte.
        states, _ = _layer(MI_ROWS, seed)
        turns.append(_timed(partial(_whiten, states, whitened)))
    expert, target = whitened[:MI_LAYERS], whitened[MI_LAYERS:]
    turns.append(_timed(lambda: layer_information(expert, target, MI_PERMUTATIONS, 0)))
    note = (
        f"{sum(turn.cpu_seconds for turn in turns):.1f} s of processor; {MI_LAYERS} x {MI_LAYERS} layers, "
        f"n = {MI_ROWS}, r = {MI_COMPONENTS}, {MI_PERMUTATIONS} permutations; {turns[-1].seconds:.1f} s without the "
        "whitening"
    )
    return Result("information", sum(turn.seconds for turn in turns), 120, " s", note)


def _whiten(states: Tensor, whitened: list[Tensor]) -> None:
    whitened.append(whiten_layer(states, MI_COMPONENTS))


def _capture(rounds: int) -> Result:
    order = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="expertsteer-offline-") as folder:
        model = _random_model(Path(folder) / "model")
        rows = list(_texts())
        stores = (Path(folder) / f"states-{number}" for number in range(4 * rounds + 1))

        def capture() -> None:
            layers = range(model.num_layers)
            capture_states(model, rows, layers, next(stores), "bench", BATCH_TOKENS, "capture", quiet=True)

        prompts = [model.prompt_ids(row) for row in rows]
        works: dict[str, Callable[[], None]] = {"capture": capture, "plain": lambda: _forward(model, prompts)}
        times: dict[str, list[list[Turn]]] = {name: [] for name in works}
        for work in works.values():
            work()
        for _ in range(rounds):
            names = order.sample(list(works), len(works))
            turns: dict[str, list[Turn]] = {name: [] for name in works}
            for name in (*names, *reversed(names)):
                turns[name].append(_timed(works[name]))
            for name in works:
                times[name].append(turns[name])
    ours, theirs = (Samples.of([times[name]]) for name in ("capture", "plain"))
    ratio = ours.seconds_over(theirs)
    note = (
        f"95 % interval [{ratio.low:.3f}, {ratio.high:.3f}], processor time {ours.cpu_seconds_over(theirs)}; "
        f"{rounds} rounds, {sum(map(len, prompts))} tokens a turn"
    )
    return Result("capture", ratio.estimate, 1.05, "", note)


@torch.inference_mode()
def _forward(model: CausalModel, prompts: list[list[int]]) -> None:
    """Everything but the states: the decoder without logits, in the batches that capture makes."""
    for indices in batches(prompts, BATCH_TOKENS):
        batch = pad(model, [prompts[index] for index in indices], left=False)
        model.network.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def _timed(work: Callable[[], object]) -> Turn:
    cpu_start, start = time.process_time(), time.perf_counter()
    work()
    return Turn(time.perf_counter() - start, time.process_time() - cpu_start)


def _layer(num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """States [num_rows, WIDTH] with a falling spectrum, and one of the factors behind them [num_rows]."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, 256, generator=generator)).Q
    factors = torch.randn(num_rows, 256, generator=generator)
    noise = 0.05 * torch.randn(num_rows, WIDTH, generator=generator)
    return factors * torch.logspace(0.5, -1, 256) @ basis.T + noise, factors[:, 7]


def _random_model(folder: Path) -> CausalModel:
    """Random weights behind the lab target's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LAB / "models/target")
    tokenizer.save_pretrained(folder)
    Qwen2ForCausalLM(Qwen2Config(**CAPTURE_SHAPE, vocab_size=len(tokenizer))).save_pretrained(folder)
    return load_model("random", folder, "float32", "cpu")


def _texts() -> Iterator[Text]:
    """Rows of about equal length, different words each."""
    lines = (LAB / "data/neutral.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    for row in range(CAPTURE_ROWS):
        start = row * CAPTURE_WORDS % (len(words) - CAPTURE_WORDS)
        yield Text(text=" ".join(words[start : start + CAPTURE_WORDS]))


MEASUREMENTS: dict[str, Callable[[int], Result]] = {
    "bundle": _bundle,
    "rfm": _rfm,
    "information": _information,
    "capture": _capture,
}


if __name__ == "__main__":
    sys.exit(main())
