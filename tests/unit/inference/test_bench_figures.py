"""From vLLM's results to figures, ratios, tables and files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from server.bench.client import BenchError
from server.bench.figures import figures
from server.bench.files import add_turn, make_folder, write_report
from server.bench.measured import Measured, measured
from server.bench.plan import UNSTEERED, Plan, Turn
from server.bench.ratios import ratio_of_percentiles, ratio_of_sums
from server.bench.table import markdown_tables, terminal_table
from server.schema import Receipt

OUTPUT_TOKENS = 5
RECEIPT = Receipt(
    profile="careful", bundle="sha256:" + "0" * 64, strength=0.5, scope="all", layers=[2], tokens_steered=3
)


def plan(**changes: Any) -> Plan:
    """A benchmark of two arms."""
    fields = {
        "server": "http://127.0.0.1:8000",
        "model": "lab",
        "tokenizer": "folder",
        "profiles": ("careful",),
        "rates": (2.0,),
        "num_prompts": 40,
        "input_tokens": 64,
        "output_tokens": OUTPUT_TOKENS,
        "num_rounds": 4,
        "seed": 0,
        "salt": "run",
    }
    return Plan(**(fields | changes))


def turn(
    arm: str, number: int, slower: float = 1.0, rate: float = 2.0, num_prompts: int = 40, **changes: Any
) -> Measured:
    """A turn whose requests take random times, the same for both arms but for a factor."""
    rng = np.random.default_rng(number)
    ttft_s = slower * rng.uniform(0.01, 0.1, num_prompts)
    itls = slower * rng.uniform(0.001, 0.01, (num_prompts, OUTPUT_TOKENS - 1))
    result = {
        "duration": slower * num_prompts / rate if math.isfinite(rate) else slower,
        "output_lens": [OUTPUT_TOKENS] * num_prompts,
        "errors": [""] * num_prompts,
        "ttfts": ttft_s.tolist(),
        "itls": itls.tolist(),
        "latencies": (ttft_s + itls.sum(1)).tolist(),
    }
    return measured(Turn(rate, number, arm), result | changes, OUTPUT_TOKENS)


class TestMeasured:
    def test_times(self) -> None:
        one = turn(UNSTEERED, 0, num_prompts=3, ttfts=[0.1, 0.2, 0.3], latencies=[0.5, 1.0, 0.7])
        assert one.tpot_s == pytest.approx([0.1, 0.2, 0.1])
        assert (one.num_completed, one.num_output_tokens, one.errors) == (3, 15, ())

    def test_failures_have_no_times(self) -> None:
        lengths = [OUTPUT_TOKENS, 0, 2]
        errors = ["", "Traceback:\n  line\nConnectionResetError: gone", ""]
        one = turn(UNSTEERED, 0, num_prompts=3, output_lens=lengths, errors=errors)
        assert one.errors == ("ConnectionResetError: gone", "the answer ended after 2 of 5 tokens")
        assert (one.num_completed, one.num_output_tokens, len(one.itl_s)) == (1, OUTPUT_TOKENS, OUTPUT_TOKENS - 1)
        for times in (one.ttft_s, one.tpot_s, one.e2e_s):
            assert np.isnan(times).tolist() == [False, True, True]


class TestRatios:
    def test_equal_arms(self) -> None:
        times = np.random.default_rng(0).lognormal(size=(4, 50))
        for percentile in (50, 99):
            assert ratio_of_percentiles(times, times, percentile) == pytest.approx((1, 1, 1))

    def test_pairing_finds_a_small_factor_in_wide_times(self) -> None:
        theirs = np.random.default_rng(0).lognormal(sigma=1.5, size=(4, 200))
        noise = np.random.default_rng(1).normal(1.03, 0.005, size=theirs.shape)
        found = ratio_of_percentiles(theirs * noise, theirs, 50)
        unpaired = ratio_of_percentiles(theirs * noise, theirs[:, ::-1], 50)
        assert found is not None and unpaired is not None
        assert 1.01 < found.low < found.estimate < found.high < 1.05
        assert unpaired.low < 1 < unpaired.high

    def test_interval_holds_the_truth_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(2)
        hits = 0
        for _ in range(30):
            drift = rng.normal(1, 0.05, (4, 1))
            ours, theirs = (drift * rng.lognormal(sigma=0.3, size=(4, 60)) for _ in range(2))
            found = ratio_of_percentiles(ours, theirs, 50)
            assert found is not None
            hits += found.low <= 1 <= found.high
        assert hits >= 25

    def test_failures_are_left_out(self) -> None:
        theirs = np.ones((2, 10))
        ours = 2 * theirs
        ours[0, 3] = theirs[1, 2] = np.nan
        assert ratio_of_percentiles(ours, theirs, 50) == (2, 2, 2)
        assert ratio_of_percentiles(ours * np.nan, theirs, 50) is None
        assert ratio_of_percentiles(theirs, 0 * theirs, 50) is None

    def test_throughput(self) -> None:
        amounts, times = np.full(4, 100.0), np.array([1.0, 2.0, 1.0, 2.0])
        assert ratio_of_sums((amounts, times), (amounts, times / 2)) == pytest.approx((0.5, 0.5, 0.5))
        assert ratio_of_sums((amounts[:1], times[:1]), (amounts[:1], times[:1])) is None
        assert ratio_of_sums((amounts, times), (0 * amounts, times)) is None

    def test_many_requests_go_through_in_blocks(self) -> None:
        times = np.random.default_rng(0).lognormal(size=(4, 1500))
        found = ratio_of_percentiles(1.1 * times, times, 99)
        assert found == pytest.approx((1.1, 1.1, 1.1))


class TestFigures:
    def test_ratios_and_percentiles(self) -> None:
        turns = [turn(arm, number, 1.1 if arm == "careful" else 1.0) for number in range(4) for arm in plan().arms]
        found = figures(plan(), turns)
        ratios = {ratio.name: ratio.interval for ratio in found.ratios}
        assert set(ratios) == {"throughput", *(f"{name}_p{p}" for name in ("ttft", "tpot", "e2e") for p in (50, 99))}
        for name, interval in ratios.items():
            assert interval == pytest.approx([1 / 1.1 if name == "throughput" else 1.1] * 3), name
        unsteered, careful = found.at(2.0)
        everything = np.concatenate([one.ttft_s for one in turns if one.turn.arm == UNSTEERED])
        assert unsteered.percentile_ms("ttft", 99) == pytest.approx(1e3 * np.percentile(everything, 99))
        assert unsteered.output_tokens_per_s == pytest.approx(2 * OUTPUT_TOKENS)
        assert (careful.num_completed, careful.num_failed) == (160, 0)

    def test_only_complete_rounds_count(self) -> None:
        turns = [turn(UNSTEERED, 0), turn("careful", 0), turn("careful", 1), turn("careful", 1, rate=8.0)]
        found = figures(plan(rates=(2.0, 8.0)), turns)
        assert found.num_rounds == {2.0: 1}
        assert [(arm.arm, arm.num_completed) for arm in found.arms] == [(UNSTEERED, 40), ("careful", 40)]
        assert found.ratio(2.0, "careful", "throughput") is None
        assert found.ratio(2.0, "careful", "ttft_p50") == pytest.approx((1, 1, 1))

    @pytest.mark.parametrize(
        ("duration_s", "rate", "has_kept_up"), [(20.5, 2.0, True), (26.0, 2.0, False), (500.0, math.inf, True)]
    )
    def test_a_server_that_does_not_keep_up(self, duration_s: float, rate: float, has_kept_up: bool) -> None:
        turns = [turn(arm, 0, rate=rate, duration=duration_s) for arm in plan().arms]
        assert {arm.has_kept_up for arm in figures(plan(rates=(rate,)), turns).arms} == {has_kept_up}


class TestReport:
    def test_tables_have_every_figure_and_nothing_that_drives_a_terminal(self) -> None:
        name = "a|\x1b[31m[b]"
        one = plan(profiles=(name,), rates=(2.0, math.inf))
        turns = [turn(arm, number, rate=rate) for rate in one.rates for number in range(2) for arm in one.arms]
        found = figures(one, turns)
        console = Console(width=120, force_terminal=False)
        with console.capture() as capture:
            console.print(terminal_table(one, found))
        text = capture.get()
        for words in ("2 requests/s", "all at once", "TTFT p99, ms", "ITL p50, ms", "0 of 80", "1.000 [1.000, 1.000]"):
            assert words in text, words
        assert "\x1b" not in text and "[b]" in text
        markdown = markdown_tables(one, found)
        assert "\x1b" not in markdown and "a\\|" in markdown
        assert {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")} == {5}

    def test_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "results"
        make_folder(folder)
        one = plan(num_rounds=2, rates=(2.0, math.inf))
        errors = ["", "ConnectionResetError: gone", *[""] * 38]
        turns = [
            turn(arm, number, rate=rate, errors=errors) for rate in one.rates for number in (0, 1) for arm in one.arms
        ]
        for each in turns:
            add_turn(folder, each)
        write_report(folder, one, figures(one, turns), {"careful": RECEIPT}, ["A note."], {"vllm": "0.32.0"})
        lines = [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]
        assert len(lines) == 8 and lines[0]["ttft_s"][1] is None and lines[-1]["rate"] == "inf"
        assert len(lines[0]["itl_s"]) == 39 * (OUTPUT_TOKENS - 1)

        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} is no JSON")

        report = json.loads((folder / "bench.json").read_text(), parse_constant=refuse)
        assert report["receipts"]["careful"]["strength"] == 0.5 and report["plan"]["rates"] == [2.0, "inf"]
        assert [arm["num_failed"] for arm in report["arms"]] == [2] * 4
        text = (folder / "bench.md").read_text()
        assert "A note." in text and "vllm 0.32.0" in text and "(bench.svg)" in text
        svg = (folder / "bench.svg").read_text()
        assert "careful" in svg and "time to first token" in svg and "2 requests/s" in svg
        assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(BenchError, match="holds a result already; choose another folder"):
            make_folder(folder)

    def test_one_generated_token_has_no_further_one(self, tmp_path: Path) -> None:
        one = plan(num_rounds=1, output_tokens=1, num_prompts=2)
        result = {"duration": 1.0, "output_lens": [1, 1], "errors": ["", ""], "ttfts": [0.1, 0.2], "itls": [[], []]}
        turns = [measured(Turn(2.0, 0, arm), result | {"latencies": [0.1, 0.2]}, 1) for arm in one.arms]
        found = figures(one, turns)
        assert found.at(2.0)[0].percentile_ms("tpot", 50) is None
        assert "| TPOT p50, ms | - | - | - |" in markdown_tables(one, found)
        make_folder(tmp_path / "results")
        write_report(tmp_path / "results", one, found, {}, [], {})
        assert (tmp_path / "results" / "bench.svg").exists()
