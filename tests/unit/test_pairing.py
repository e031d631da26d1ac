"""Held-out pairing: which trials are safe, which is best, and how pairs are ranked."""

from artifacts.pairing.held_out import Budget, PairScore, Trial, best_trial, rank_pairs, safe_trials, score_pair

BUDGET = Budget(1.25)
UNSTEERED = Trial(0.0, 0.1, 1.0, -2.0)


def test_safety_ends_at_the_first_strength_over_the_budget() -> None:
    trials = [Trial(0.9, 0.9, 1.1), Trial(0.1, 0.2, 1.0), Trial(0.6, 0.8, 1.3), Trial(0.3, 0.5, 1.25)]
    assert [trial.strength for trial in safe_trials(trials, BUDGET)] == [0.1, 0.3]
    assert safe_trials([Trial(0.1, 1.0, 1.3)], BUDGET) == ()


def test_retention_is_a_budget_of_its_own() -> None:
    trials = [Trial(0.1, 0.2, 1.0, retention=0.97), Trial(0.3, 0.5, 1.0, retention=0.9)]
    assert [trial.strength for trial in safe_trials(trials, Budget(1.25, 0.05))] == [0.1]
    assert [trial.strength for trial in safe_trials(trials, Budget(1.25, 0.2))] == [0.1, 0.3]
    assert len(safe_trials(trials, BUDGET)) == 2


def test_best_prefers_accuracy_then_perplexity_then_strength() -> None:
    assert best_trial([Trial(0.5, 0.7, 1.2), Trial(0.3, 0.6, 1.0)]) == Trial(0.5, 0.7, 1.2)
    assert best_trial([Trial(0.5, 0.7, 1.2), Trial(0.6, 0.7, 1.1)]) == Trial(0.6, 0.7, 1.1)
    assert best_trial([Trial(0.5, 0.7, 1.1), Trial(0.4, 0.7, 1.1)]) == Trial(0.4, 0.7, 1.1)
    assert best_trial([]) is None


def test_objective_decides_what_is_best() -> None:
    exact, likely = Trial(0.3, 0.9, 1.0, -1.5), Trial(0.5, 0.4, 1.0, -0.5)
    assert best_trial([exact, likely], "exact") == exact
    assert best_trial([exact, likely], "likelihood") == likely
    score = score_pair(0, 0, [exact, likely], UNSTEERED, BUDGET, "likelihood")
    assert (score.gain, score.best) == (1.5, likely)


def test_score_keeps_every_trial_and_the_gain() -> None:
    trials = [Trial(0.6, 0.9, 2.0), Trial(0.3, 0.5, 1.1)]
    score = score_pair(2, 4, trials, UNSTEERED, BUDGET)
    assert score == PairScore(2, 4, 0.4, Trial(0.3, 0.5, 1.1), tuple(sorted(trials)))
    unusable = score_pair(2, 4, trials, UNSTEERED, Budget(1.05))
    assert (unusable.gain, unusable.best) == (None, None)
    assert len(unusable.trials) == 2


def test_ranking_drops_unusable_pairs_and_breaks_ties_by_perplexity_then_layer() -> None:
    def pair(expert: int, target: int, accuracy: float, ratio: float) -> PairScore:
        return score_pair(expert, target, [Trial(0.5, accuracy, ratio)], UNSTEERED, BUDGET)

    scores = [
        pair(0, 1, 0.5, 1.1),
        pair(1, 1, 0.5, 1.0),
        pair(1, 0, 0.5, 1.0),
        pair(2, 2, 0.9, 1.2),
        pair(3, 3, 1.0, 9.0),
    ]
    assert [(each.expert, each.target) for each in rank_pairs(scores)] == [(2, 2), (1, 0), (1, 1), (0, 1)]
