"""Whether a profile can be moved between two bundles under load without anybody noticing but by the receipt.

    python tests/bench/swaps.py [--swaps 500] [--streams 64] [--server URL] [--json FILE]

One profile goes to and fro between bundle A and bundle B, by PUT and by rollback, while streams ask for greedy answers
under its name without a pause. Every answer must be what its receipt says, to the letter: the text that A alone gives,
or the text that B alone gives, with the count of tokens that its scope implies. Prompts are those of a larger set whose
greedy choices are clearest under both, so that rounding in batches of other sizes cannot change a text.

failed      no whole answer, or one without a receipt
mixed       the text is not that of the bundle on the receipt
miscounted  the receipt counts other tokens than those the scope steers
stale       the bundle was not current at any time between request and first byte

The exit status is 0 when all of these are 0. Without --server one is started, from the repository's lab model.
"""

import argparse
import asyncio
import json
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from random_bundle import random_bundle
from rich.console import Console
from rich.table import Table
from served import Served, ServerError, add_server_arguments
from shapes import LAB_MODEL
from swap_figures import Answer, Change, Figures, judge

from server.admin_schema import ProfileSpec
from server.client import SteeringClient, SteeringClientError

PROFILE = "swapped"
TEXTS = LAB_MODEL.parents[1] / "data" / "neutral.jsonl"
NUM_CANDIDATES, NUM_PROMPTS, WORDS = 32, 8, 24
# Of log-probabilities: rounding of fp32 moves them by about a ten-thousandth.
LEAST_MARGIN = 2e-3
# A write by rollback instead of PUT, one in so many.
ROLLBACK_EVERY = 4
REQUEST_TIMEOUT_S = 300.0
FLAGS = ("--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "64", "--steering-write-rate", "100000")


class SwapError(RuntimeError):
    """Nothing can be measured."""


class Address(NamedTuple):
    """Where a server is, and a write key for it; None where there are no keys."""

    url: str
    key: str | None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of an HTTP client."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        # A request must not meet a proxy of the machine it runs on.
        return {"base_url": self.url, "headers": headers, "timeout": REQUEST_TIMEOUT_S, "trust_env": False}


class PureAnswer(NamedTuple):
    """What one bundle alone says, and how far the second choice was behind, at the closest."""

    text: str
    margin: float


def main() -> int:
    """Measure and print; see the module's docstring."""
    args = _parse()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertsteer-swaps-")))
            server = Address(args.server, args.key)
            if args.server is None:
                key = secrets.token_urlsafe(24)
                flags = [*FLAGS, "--steering-registry", str(folder / "registry")]
                served = stack.enter_context(Served(LAB_MODEL, flags, key, folder / "server.log"))
                server = Address(served.url, key)
            figures = _measure(server, folder, args)
    except (ServerError, SwapError, SteeringClientError, httpx.HTTPError) as error:
        print(f"swaps: {error}", file=sys.stderr)
        return 1
    _print(figures)
    if args.json:
        args.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")
    return 0 if figures.is_clean else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Moves a profile between two bundles under load.")
    parser.add_argument("--swaps", type=int, default=500, help="changes of the profile (default: 500)")
    parser.add_argument("--streams", type=int, default=64, help="answers at the same time (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer (default: 48)")
    parser.add_argument("--pause-ms", type=float, default=50.0, help="mean pause between changes (default: 50)")
    add_server_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the pauses (default: 0)")
    args = parser.parse_args()
    for name in ("swaps", "streams", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, the least is 1")
    return args


def _measure(server: Address, folder: Path, args: argparse.Namespace) -> Figures:
    with SteeringClient(server.url, server.key) as admin:
        bundles = [
            admin.upload(random_bundle(folder / f"swap-{seed}.safetensors", [0, 2, 4], seed)).digest for seed in (1, 2)
        ]
        try:
            pure = _pure_answers(server, admin, bundles, args.max_tokens)
            answers, changes = asyncio.run(_run(server, admin, bundles, pure, args))
        finally:
            admin.delete_profile(PROFILE, drain=True)
            for digest in bundles:
                admin.delete_bundle(digest, drain=True)
    texts = {prompt: {digest: each.text for digest, each in found.items()} for prompt, found in pure.items()}
    return judge(answers, changes, bundles, texts, args.streams)


def _pure_answers(
    server: Address, admin: SteeringClient, bundles: Sequence[str], max_tokens: int
) -> dict[str, dict[str, PureAnswer]]:
    """What each bundle alone says, by prompt and digest, for the prompts with the clearest choices."""
    lines = TEXTS.read_text().splitlines()[:NUM_CANDIDATES]
    prompts = [" ".join(json.loads(line)["text"].split()[:WORDS]) for line in lines]
    found: dict[str, dict[str, PureAnswer]] = {prompt: {} for prompt in prompts}
    with httpx.Client(**server.options) as client:
        for digest in bundles:
            admin.put_profile(PROFILE, ProfileSpec(bundle=digest))
            body = _body(prompts, max_tokens) | {"logprobs": 2}
            for choice in client.post("/v1/completions", json=body).raise_for_status().json()["choices"]:
                tops = [sorted(each.values(), reverse=True) for each in choice["logprobs"]["top_logprobs"]]
                margin = min(top[0] - top[1] for top in tops)
                found[prompts[choice["index"]]][digest] = PureAnswer(choice["text"], margin)
    clear = {prompt: min(each.margin for each in by_bundle.values()) for prompt, by_bundle in found.items()}
    best = sorted(clear, key=lambda prompt: clear[prompt], reverse=True)[:NUM_PROMPTS]
    for prompt in best:
        if clear[prompt] < LEAST_MARGIN:
            raise SwapError(f"a greedy choice is ahead by only {clear[prompt]:.1g}; take fewer --max-tokens")
        if len({each.text for each in found[prompt].values()}) < len(bundles):
            raise SwapError(f"both bundles give the same text to {prompt!r}, which then tells nothing")
    return {prompt: found[prompt] for prompt in best}


async def _run(
    server: Address,
    admin: SteeringClient,
    bundles: Sequence[str],
    pure: Mapping[str, Mapping[str, PureAnswer]],
    args: argparse.Namespace,
) -> tuple[list[Answer], list[Change]]:
    # The profile is at the second one after `_pure_answers`.
    changes = [Change(-1.0, -1.0, bundles[1])]
    answers: list[Answer] = []
    is_over = asyncio.Event()
    limits = httpx.Limits(max_connections=args.streams)
    async with httpx.AsyncClient(**server.options, limits=limits) as client:
        prompts = list(pure)

        async def keep_asking(index: int) -> None:
            while not is_over.is_set():
                answers.append(await _ask(client, prompts[index % len(prompts)], args.max_tokens))
                index += 1

        streams = [asyncio.create_task(keep_asking(index)) for index in range(args.streams)]
        try:
            await asyncio.to_thread(_swap, admin, bundles, changes, args)
        finally:
            is_over.set()
            await asyncio.gather(*streams)
    return answers, changes


def _swap(admin: SteeringClient, bundles: Sequence[str], changes: list[Change], args: argparse.Namespace) -> None:
    pauses = random.Random(args.seed)
    for index in range(args.swaps):
        time.sleep(pauses.uniform(0.0, 2 * args.pause_ms / 1000))
        digest = bundles[index % 2]
        begin_s = time.monotonic()
        if index % ROLLBACK_EVERY == ROLLBACK_EVERY - 1:
            answer = admin.rollback(PROFILE)
        else:
            answer = admin.put_profile(PROFILE, ProfileSpec(bundle=digest))
        changes.append(Change(begin_s, time.monotonic(), digest))
        if answer.bundle != digest or not answer.changed or not answer.observed:
            raise SwapError(f"change {index} was answered with {answer.model_dump_json()}")


async def _ask(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Answer:
    answer = Answer(prompt, time.monotonic())
    body = _body(prompt, max_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            answer.first_s = time.monotonic()
            answer.header = response.headers.get("x-steering-bundle", "")
            if response.status_code != httpx.codes.OK:
                answer.failure = f"status {response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            await _read(response, answer)
    except httpx.HTTPError as error:
        answer.failure = repr(error)
    answer.end_s = time.monotonic()
    return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    answer.failure = "the stream ended early"
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            answer.failure = None if answer.bundle else "no receipt"
            continue
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.failure = str(chunk["error"])[:200]
            return
        answer.text += "".join(choice["text"] for choice in chunk["choices"])
        if chunk.get("usage"):
            answer.num_scoped = chunk["usage"]["total_tokens"] - 1
        if "steering" in chunk:
            answer.bundle, answer.num_steered = chunk["steering"]["bundle"], chunk["steering"]["tokens_steered"]


def _body(prompt: str | Sequence[str], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "steering_profile": PROFILE,
    }


def _print(figures: Figures) -> None:
    table = Table(title=f"{figures.swaps} swaps under {figures.streams} streams, {figures.duration_s:.0f} s")
    for column in ("answers", "across a swap", "of A", "of B", "failed", "mixed", "miscounted", "stale"):
        table.add_column(column, justify="right")
    counts = (figures.answers, figures.answers_across_a_swap, *figures.answers_by_bundle)
    table.add_row(*map(str, (*counts, figures.failed, figures.mixed, figures.miscounted, figures.stale)))
    console = Console()
    console.print(table)
    console.print(
        f"activate: p50 {figures.activate_p50_ms:.1f} ms, p99 {figures.activate_p99_ms:.1f} ms, "
        f"most {figures.activate_max_ms:.1f} ms"
    )
    for failure in figures.failures:
        console.print(failure, markup=False)


if __name__ == "__main__":
    sys.exit(main())
