"""What many profiles cost: throughput under them, changes of them, a start with them, a scrape of their metrics.

    python tests/bench/registry.py [--profiles 1000] [--rounds 8] [--activations 200] [--uploads 20] [--scrapes 20]

One server holds as many bundles as there are profiles, each with a vector of its own. A round is a turn under one
profile and a turn in which every request draws a profile by a power law (popularity 1 / rank), then both in the reverse
order. Every answer's receipt must name the bundle of the profile that was asked for. The model is as wide as Llama 8B,
so that bundles have the size of real ones, and otherwise small, so that what is measured is not the model.

activate         PUT of a profile to another loaded bundle, until every process admits requests with it
validate, stage  from the last byte of an upload until every worker holds the bundle, as the server reports it
start            from the start of the process until /health/ready is 200

The exit status is 0 unless something could not be measured: whether a figure over its goal is the fault of the code or
of a busy machine is for the reader to say.
"""

import argparse
import os
import random
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from ratios import ratio_of_rounds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from served import Served, ServerError
from wide_model import MAX_PER_LAYER, NUM_LAYERS, ROW_BYTES, wide_bundle, wide_model

from server.client import SteeringClient

KEY = "write-key-of-the-benchmark"
CONCURRENCY, REQUESTS_PER_TURN, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 32, 16, 16
GOAL_ACTIVATE_MS, GOAL_STAGE_MS = 50.0, 200.0
_VOCABULARY = range(100, 600)
_CHANGED_PROFILES = 16


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    goal: str = ""


class Profile(NamedTuple):
    """A profile of the server, and the bundle that its receipts must name."""

    name: str
    digest: str


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="expertsteer-registry-") as folder:
        try:
            figures = _measure(args, Path(folder))
        except (ServerError, httpx.HTTPError, UnexpectedAnswerError) as error:
            print(f"registry: {error}", file=sys.stderr)
            return 1
    table = Table(title=f"Registry with {args.profiles} profiles")
    for column in ("figure", "found", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right", no_wrap=True)
    for figure in figures:
        table.add_row(*figure)
    table.caption = (
        f"python tests/bench/registry.py {shlex.join(sys.argv[1:])}".rstrip()
        + f"\n{os.cpu_count()} cores, load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        + f"\n{args.rounds} rounds, each variant twice a round; {REQUESTS_PER_TURN} requests a turn, "
        + f"{CONCURRENCY} at a time, {PROMPT_TOKENS}+{OUTPUT_TOKENS} tokens"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


class UnexpectedAnswerError(RuntimeError):
    """The server did something else than what was to be measured."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What many profiles cost.", epilog="The defaults take about 6 minutes."
    )
    for name, default, what in (
        ("profiles", 1000, "profiles, each with a bundle of its own"),
        ("rounds", 8, "rounds of the comparison of throughput"),
        ("activations", 200, "changes of a profile"),
        ("uploads", 20, "uploads of a bundle of 1 MiB"),
        ("scrapes", 20, "scrapes of the metrics"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    args = parser.parse_args()
    for name, least in (("profiles", 2), ("rounds", 2), ("activations", 2), ("uploads", 1), ("scrapes", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, the least is {least}")
    return args


def _measure(args: argparse.Namespace, folder: Path) -> list[Figure]:
    model = wide_model(folder / "model")
    num_rows = args.profiles + (args.uploads + 1) * MAX_PER_LAYER * NUM_LAYERS
    flags = [
        *("--enforce-eager", "--max-model-len", "128", "--max-num-seqs", str(4 * CONCURRENCY)),
        *("--steering-rows", str(num_rows), "--steering-write-rate", "10000"),
    ]
    registry, log = folder / "registry", folder / "server.log"
    on_registry = ["--steering-registry", str(registry)]
    with Served(model, [*flags, *on_registry], KEY, log) as server:
        empty_start_s = server.start_s
        profiles = _register(server.client, args.profiles, folder)
        figures = [
            *_throughput(server.client, profiles, args.rounds),
            *_activations(server.client, profiles, args.activations),
            *_uploads(server.client, args.uploads, folder),
            *_scrapes(server.client, args.scrapes),
        ]
    with Served(model, [*flags, *on_registry], KEY, log) as server:
        started_s = time.monotonic()
        _ask(server.client, profiles[-1], 0)
        first_s = time.monotonic() - started_s
        _require_all(server.url, profiles)
        return [
            *figures,
            Figure("start, empty registry", f"{empty_start_s:.1f} s"),
            Figure(f"start, {args.profiles} profiles", f"{server.start_s:.1f} s"),
            Figure("first steered answer after that", f"{1e3 * first_s:.0f} ms", "<= 5 s"),
        ]


def _register(client: httpx.Client, count: int, folder: Path) -> list[Profile]:
    """Upload a bundle of one vector for every profile, and name it."""
    path, profiles = folder / "small.safetensors", []
    for index in track(range(count), "profiles", console=Console(stderr=True), transient=True):
        digest = _upload(client, wide_bundle(path, [index % NUM_LAYERS], index))["digest"]
        profiles.append(Profile(f"profile-{index}", digest))
        _put(client, profiles[-1].name, digest)
    return profiles


def _throughput(client: httpx.Client, profiles: Sequence[Profile], num_rounds: int) -> list[Figure]:
    """Turns under one profile and under all by popularity, alternating within rounds."""
    popularity = list(accumulate(1 / rank for rank in range(1, len(profiles) + 1)))
    order = random.Random(0)

    def one() -> list[Profile]:
        return [profiles[0]] * REQUESTS_PER_TURN

    def all_by_popularity() -> list[Profile]:
        return order.choices(profiles, cum_weights=popularity, k=REQUESTS_PER_TURN)

    variants: dict[str, Callable[[], list[Profile]]] = {"one": one, "all": all_by_popularity}
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    named: set[str] = set()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for number in track(range(num_rounds + 1), "throughput", console=Console(stderr=True), transient=True):
            names = order.sample(sorted(variants), len(variants))
            turns: dict[str, list[float]] = {name: [] for name in variants}
            for name in (*names, *reversed(names)):
                drawn, seed = variants[name](), order.getrandbits(32)
                named |= {profile.name for profile in drawn}
                started_s = time.perf_counter()
                list(pool.map(lambda each: _ask(client, *each), [(one, seed + at) for at, one in enumerate(drawn)]))
                turns[name].append(time.perf_counter() - started_s)
            # The first round warms up.
            for name, times in turns.items():
                seconds[name] += [times] if number else []
    ratio = ratio_of_rounds(*(np.array([seconds[name]]) for name in ("one", "all")))
    tokens_per_s = REQUESTS_PER_TURN * OUTPUT_TOKENS / float(np.median(seconds["all"]))
    return [
        Figure(
            f"throughput, {len(profiles)} profiles by popularity / one profile",
            str(ratio),
            "1 inside" if ratio.low <= 1 <= ratio.high else "1 outside",
        ),
        Figure(f"the same, absolute; {len(named)} profiles were drawn", f"{tokens_per_s:.0f} tokens/s"),
    ]


def _activations(client: httpx.Client, profiles: Sequence[Profile], count: int) -> list[Figure]:
    """Changes of a few profiles more, without and with requests; those that the requests name stay as they are."""
    figures = []
    # Fewer than bundles, so that a profile never gets the one that it has.
    names = [f"changed-{index}" for index in range(min(_CHANGED_PROFILES, len(profiles) - 1))]
    changes = zip(cycle(names), cycle(profiles))
    for what, num_threads in (("idle", 0), (f"{CONCURRENCY} requests at a time", CONCURRENCY)):
        with _traffic(client, profiles[-1], num_threads):
            times = []
            for name, profile in islice(changes, count):
                started_s = time.perf_counter()
                answer = _put(client, name, profile.digest)
                times.append(time.perf_counter() - started_s)
                if not answer["changed"] or not answer["observed"]:
                    raise UnexpectedAnswerError(f"the change of {name} was not made or not seen: {answer}")
        figures.append(_latency(f"activate, {what}", times, f"p99 <= {GOAL_ACTIVATE_MS:.0f} ms"))
    for name in names[:count]:
        client.delete(f"/v1/steering/profiles/{name}").raise_for_status()
    return figures


def _uploads(client: httpx.Client, count: int, folder: Path) -> list[Figure]:
    layers = [layer for layer in range(NUM_LAYERS) for _ in range(MAX_PER_LAYER)]
    inside, whole = [], []
    for index in range(count):
        path = wide_bundle(folder / "large.safetensors", layers, 10**6 + index)
        started_s = time.perf_counter()
        answer = _upload(client, path)
        whole.append(time.perf_counter() - started_s)
        inside.append(answer["duration_s"])
        if not answer["is_resident"]:
            raise UnexpectedAnswerError(f"an upload left its bundle out of the workers: {answer}")
    size = f"{len(layers) * ROW_BYTES / 2**20:.0f} MiB"
    return [
        _latency(f"validate, stage, {size}", inside, f"<= {GOAL_STAGE_MS:.0f} ms"),
        _latency(f"upload of the same, as its client sees it, {size}", whole),
    ]


def _scrapes(client: httpx.Client, count: int) -> list[Figure]:
    times, num_bytes = [], 0
    for _ in range(count):
        started_s = time.perf_counter()
        num_bytes = len(client.get("/metrics").raise_for_status().content)
        times.append(time.perf_counter() - started_s)
    return [_latency(f"scrape of {num_bytes / 1e6:.2f} MB", times)]


def _latency(what: str, seconds: Sequence[float], goal: str = "") -> Figure:
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    return Figure(f"{what}: p50, p99 of {len(seconds)}", f"{p50:.1f}, {p99:.1f} ms", goal)


@contextmanager
def _traffic(client: httpx.Client, profile: Profile, num_threads: int) -> Iterator[None]:
    """Requests under a profile that nobody changes, one after the other in each thread."""
    is_over = threading.Event()

    def keep_asking(seed: int) -> None:
        while not is_over.is_set():
            _ask(client, profile, seed)

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        loops = [pool.submit(keep_asking, seed) for seed in range(num_threads)]
        try:
            yield
        finally:
            is_over.set()
        for loop in loops:
            loop.result()


def _ask(client: httpx.Client, profile: Profile, seed: int) -> None:
    body = {
        "model": "bench",
        "prompt": random.Random(seed).choices(_VOCABULARY, k=PROMPT_TOKENS),
        "temperature": 0,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "steering_profile": profile.name,
    }
    receipt = client.post("/v1/completions", json=body).raise_for_status().json()["steering"]
    # The last token is not run through the model.
    if receipt["bundle"] != profile.digest or receipt["tokens_steered"] != PROMPT_TOKENS + OUTPUT_TOKENS - 1:
        raise UnexpectedAnswerError(f"{profile} was asked for and the receipt says {receipt}")


def _upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    headers = {"content-type": "application/octet-stream"}
    answer = client.post("/v1/steering/bundles", content=path.read_bytes(), headers=headers).raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


def _put(client: httpx.Client, name: str, digest: str) -> dict[str, Any]:
    body: dict[str, Any] = (
        client.put(f"/v1/steering/profiles/{name}", json={"bundle": digest}).raise_for_status().json()
    )
    return body


def _require_all(url: str, profiles: Sequence[Profile]) -> None:
    """A start that has lost something is no start."""
    with SteeringClient(url, KEY) as admin:
        found = {Profile(each.name, each.bundle) for each in admin.profiles()}
    if found != set(profiles):
        raise UnexpectedAnswerError(f"the server has {len(found)} profiles after its restart, not the {len(profiles)}")


if __name__ == "__main__":
    sys.exit(main())
