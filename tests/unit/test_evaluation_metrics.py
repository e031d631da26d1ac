"""Figures and statistics against values computed by hand or by SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from artifacts.evaluation import metrics
from artifacts.evaluation import statistics as uncertainty
from artifacts.evaluation.subject import Likelihood


def test_matches() -> None:
    assert metrics.exact_match(" 12. ", "12.") and not metrics.exact_match("12", "12.")
    assert metrics.pattern_match("it is 12, surely", r"\b12\b") and not metrics.pattern_match("112", r"\b12\b")


def test_the_choice_is_by_likelihood_per_token() -> None:
    short, long = Likelihood(-3.0, 1, False), Likelihood(-4.0, 2, False)
    assert metrics.likeliest([short, long]) == 1
    assert metrics.likeliest([Likelihood(-math.inf, 1, False), short]) == 1
    assert metrics.likeliest([Likelihood(math.nan, 1, False), short]) == 1
    assert metrics.likeliest([short, short]) == 0


def test_perplexity_ratio_weighs_texts_by_their_tokens() -> None:
    off = [Likelihood(-10.0, 10, False), Likelihood(-2.0, 1, False)]
    on = [Likelihood(-12.0, 10, False), Likelihood(-2.0, 1, False)]
    assert metrics.perplexity_ratio(on, off) == pytest.approx(math.exp(2 / 11))
    assert metrics.perplexity_ratio(off, off) == 1
    assert metrics.perplexity_ratio([Likelihood(-math.inf, 10, False), off[1]], off) == math.exp(50)
    with pytest.raises(ValueError, match="differ in their tokens"):
        metrics.perplexity_ratio([Likelihood(-1.0, 9, False), off[1]], off)


def test_retention_is_a_ratio_and_none_without_a_denominator() -> None:
    assert metrics.retention([True, False, False, False], [True, True, False, False]) == 0.5
    assert metrics.retention([True, True], [False, False]) is None


def test_harmonic_means() -> None:
    assert metrics.clas(0.5, 1.0) == pytest.approx(2 / 3)
    assert metrics.clas(0, 0) == 0 == metrics.clas(0, 1)
    assert metrics.axbench(1, 2, 2) == pytest.approx(1.5)
    assert metrics.axbench(2, 2, 2) == 2
    assert metrics.axbench(0, 2, 2) == 0
    with pytest.raises(ValueError, match="outside"):
        metrics.axbench(3, 1, 1)
    with pytest.raises(ValueError, match="outside"):
        metrics.clas(1.2, 1)


def test_gap_closed() -> None:
    assert metrics.gap_closed(0.8, 0.2, 1.0) == pytest.approx(0.75)
    assert metrics.gap_closed(0.1, 0.2, 1.0) == pytest.approx(-0.125)
    assert metrics.gap_closed(0.8, 0.2, 0.2) is None


def test_dose_response_is_spearman_and_none_where_it_has_no_meaning() -> None:
    strengths, accuracies = [0, 0.25, 0.5, 0.75, 1], [0.2, 0.5, 0.9, 0.7, 0.1]
    found = metrics.dose_response(strengths, accuracies)
    assert found is not None
    expected = stats.spearmanr(strengths, accuracies)
    assert found == pytest.approx((expected.statistic, expected.pvalue))
    assert metrics.dose_response(strengths, [0.5] * 5) is None
    assert metrics.dose_response([0, 1], [0.1, 0.2]) is None


def test_bootstrap_agrees_with_scipy_on_single_rows() -> None:
    values = np.random.default_rng(1).normal(size=200)
    columns = np.stack([values, np.ones(200)], axis=1)
    found = uncertainty.bootstrap(columns, [str(index) for index in range(200)], uncertainty.ratio, 0, 4000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_rows_of_a_group_are_resampled_together() -> None:
    correct = [True] * 50 + [False] * 50
    apart = uncertainty.accuracy_interval(correct, [str(index) for index in range(100)], 0)
    together = uncertainty.accuracy_interval(correct, [str(index // 10) for index in range(100)], 0)
    assert apart.value == together.value == 0.5
    # Ten whole groups spread as ten coins do: sqrt(10) times wider.
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_all_right_is_not_certain() -> None:
    found = uncertainty.accuracy_interval([True] * 10, list("abcdefghij"), 0)
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 10))
    grouped = uncertainty.accuracy_interval([False] * 10, list("aabbccddee"), 0)
    assert grouped.high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_resamples_without_a_denominator_are_left_out() -> None:
    columns = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert uncertainty.bootstrap(columns, ["a", "b"], uncertainty.ratio, 0) == (1.0, 1.0, 1.0)


def test_the_mean_of_draws_spreads_with_the_draws_too() -> None:
    rng = np.random.default_rng(0)
    groups = [str(index) for index in range(100)]
    rates = rng.uniform(0.1, 0.9, size=30)
    draws = (rng.random((30, 100)) < rates[:, None]).astype(float)
    found = uncertainty.draws_interval(draws, groups, 0)
    assert found.value == pytest.approx(draws.mean())
    # Between the draws alone: standard error of the mean of 30 rates.
    spread = 2 * 1.96 * draws.mean(1).std(ddof=1) / math.sqrt(30)
    assert spread < found.high - found.low < 1.5 * spread
    against = uncertainty.draws_interval(draws, groups, 0, against=[True] * 100)
    assert against.value == pytest.approx(1 - draws.mean())
    assert against.low == pytest.approx(1 - found.high) and against.high == pytest.approx(1 - found.low)


def test_mcnemar_is_a_coin_over_the_disagreements() -> None:
    first = [True] * 9 + [False] * 1 + [True] * 30
    second = [False] * 9 + [True] * 1 + [True] * 30
    found = uncertainty.mcnemar(first, second)
    assert found[:2] == (9, 1)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert uncertainty.mcnemar([True, False], [True, False]).p_value == 1


def test_holm_steps_down() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1, made monotone.
    assert uncertainty.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert uncertainty.holm([0.5, 0.9]) == [1.0, 1.0]
    assert uncertainty.holm([]) == []


def test_rank_among_draws_is_never_zero() -> None:
    assert uncertainty.rank_p_value(0.9, [0.1] * 30) == pytest.approx(1 / 31)
    assert uncertainty.rank_p_value(0.1, [0.1] * 29 + [0.0]) == pytest.approx(30 / 31)
