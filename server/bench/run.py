"""A benchmark from its first probe to its report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from artifacts.errors import quoted
from server.bench.checks import Counted, check_unchanged, count, probe, steered_tokens
from server.bench.client import BenchClient, BenchError
from server.bench.figures import Figures, figures
from server.bench.files import LOG, add_turn, make_folder, write_report
from server.bench.measured import Measured, measured
from server.bench.plan import UNSTEERED, Plan, Turn
from server.bench.table import rate_text
from server.inference import InferenceClient

_BUILD = "steering_build_info"
_MAX_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Watcher:
    """Hears how far the benchmark is.

    Attributes:
        on_stage: called with what is done before the first turn.
        on_start: called with each turn.
        on_end: called with each turn that has run.
    """

    on_stage: Callable[[str], None]
    on_start: Callable[[Turn], None]
    on_end: Callable[[Measured], None]


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found.

    Attributes:
        figures: of the complete rounds.
        notes: what a reader must know besides.
        is_complete: whether every turn has run.
    """

    figures: Figures
    notes: tuple[str, ...]
    is_complete: bool


def run_bench(
    plan: Plan, client: InferenceClient, key: str | None, folder: Path, watcher: Watcher, *, with_counters: bool
) -> Outcome:
    """Measure, and write the results into a folder. Ctrl-C ends it early and leaves the complete rounds.

    Args:
        plan: what to run.
        client: of the server.
        key: API key; None for a server without keys.
        folder: for the results.
        watcher: of the progress.
        with_counters: hold the server's counters against the requests that were sent.

    Raises:
        BenchError: nothing can be measured, or what was measured was not what the plan says.
        SteeringClientError: the server refuses, or gives no answer.
        OSError: a file cannot be written.
    """
    receipts = probe(client, plan)
    make_folder(folder)
    counters_read = with_counters and all(count(client, arm) is not None for arm in plan.profiles)
    turns: list[Measured] = []
    is_complete = False
    try:
        with BenchClient(folder / LOG, key) as bench:
            watcher.on_stage("starting vLLM's client")
            bench.wait_ready()
            watcher.on_stage("warming up")
            for arguments in plan.warm_ups():
                _check_some(measured(Turn(0.0, 0, ""), bench.run(arguments), plan.output_tokens))
            for turn in plan.turns():
                watcher.on_start(turn)
                turns.append(_run_turn(plan, client, bench, turn, counters_read))
                add_turn(folder, turns[-1])
                watcher.on_end(turns[-1])
        is_complete = True
    except KeyboardInterrupt:
        if not turns:
            raise
    check_unchanged(receipts, probe(client, plan))
    found = figures(plan, turns)
    notes = _notes(plan, found, counters_read, is_complete)
    write_report(folder, plan, found, receipts, notes, _about(client))
    return Outcome(found, notes, is_complete)


def _run_turn(plan: Plan, client: InferenceClient, bench: BenchClient, turn: Turn, counters_read: bool) -> Measured:
    before: Counted | None = None
    if counters_read and turn.arm != UNSTEERED:
        before = count(client, turn.arm)
    result = measured(turn, bench.run(plan.arguments(turn)), plan.output_tokens)
    _check_some(result)
    if before is None:
        return result
    return replace(result, tokens_steered=steered_tokens(client, turn.arm, before, result.num_completed))


def _check_some(turn: Measured) -> None:
    """A turn without one good answer says that something is wrong, not how fast the server is."""
    if not turn.num_completed:
        raise BenchError(
            f"All {len(turn.errors)} requests of a turn failed, the first with {quoted(turn.errors[0], 300)}; "
            "the server's log says more."
        )


def _notes(plan: Plan, found: Figures, counters_read: bool, is_complete: bool) -> tuple[str, ...]:
    notes = [] if is_complete else ["Interrupted: only complete rounds are counted."]
    if counters_read and all(arm.tokens_steered is not None for arm in found.arms if arm.arm != UNSTEERED):
        notes.append("Checked: receipts before and after, and the server's own counts of requests and tokens steered.")
    elif counters_read:
        notes.append("Checked: receipts before and after. The server's counters could not be read before some turns.")
    else:
        notes.append("Checked: receipts before and after. The server's counters were not read.")
    for arm in found.arms:
        where = f"{arm.arm} at {rate_text(arm.rate)}"
        if not arm.has_kept_up:
            notes.append(
                f"{where}: {arm.requests_per_s:.2f} requests/s were answered, so requests queued up and their times "
                "grow with the length of the run."
            )
        shown = list(arm.errors.items())[:_MAX_ERRORS_SHOWN]
        notes += [f"{where}: {times} failed with {quoted(error, 200)}." for error, times in shown]
    if any(arm.num_failed for arm in found.arms):
        notes.append("Times are of the requests that did not fail.")
    if plan.num_rounds % 2:
        notes.append("The number of rounds is odd, so a steady drift does not cancel.")
    return tuple(notes)


def _about(client: InferenceClient) -> Mapping[str, str]:
    """Versions of the server, if it shows them."""
    samples = client.counters(_BUILD) or {}
    return next((dict(labels) for labels in samples), {})
