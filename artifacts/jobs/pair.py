"""Step 3: every accepted pair tried on the tuning split with the expert's mapped difference of means."""

from artifacts.jobs.align import align_scores, load_aligner
from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms, store
from artifacts.jobs.errors import BuildError
from artifacts.jobs.progress import progress
from artifacts.jobs.workdir import file_digest, read_value, write_value
from artifacts.pairing.held_out import PairScore, rank_pairs, score_pair
from artifacts.vectors.difference import difference_of_means, unit

NAME = "pair"
SCORES = "scores.json"


def settings(build: Build) -> object:
    """What decides the scores, apart from aligners and states."""
    tune = build.config.tune
    return {
        "pairing": build.config.pairing.model_dump(exclude={"shortlist", "pairs"}),
        "budget": tune.perplexity_budget,
        "max_new_tokens": tune.max_new_tokens,
        "data": {name: file_digest(build.data_path(name)) for name in ("tune", "neutral")},
    }


def run(build: Build) -> None:
    """Score the pairs.

    Raises:
        BuildError: no pair has a strength within the perplexity budget.
    """
    directory = build.directory(NAME)
    directory.mkdir(parents=True, exist_ok=True)
    split = build.contrast_split
    norms = layer_norms(build)
    accepted = [score for score in align_scores(build) if score.accepted]
    directions = {
        layer: difference_of_means(
            store(build, "expert", "contrast").layer(layer)[split.known], split.labels[split.known]
        )
        for layer in {score.expert for score in accepted}
    }
    tuning, config = build.tuning, build.config
    scores = []
    for aligned in progress(accepted, "try layer pairs", build.quiet):
        mapped = unit(load_aligner(build, aligned.expert, aligned.target).direction(directions[aligned.expert]))
        vectors = {aligned.target: mapped * norms[aligned.target]}
        trials = [tuning.trial(strength, vectors) for strength in config.pairing.strengths]
        budget = config.tune.perplexity_budget
        scores.append(score_pair(aligned.expert, aligned.target, trials, tuning.unsteered_accuracy, budget))
    write_value(directory / SCORES, tuple[PairScore, ...], tuple(scores))
    if not rank_pairs(scores):
        raise BuildError(
            f"no layer pair keeps the perplexity ratio under tune.perplexity_budget {config.tune.perplexity_budget} at "
            f"strength {config.pairing.strengths[0]}; add smaller pairing.strengths or raise the budget"
        )


def pair_scores(build: Build) -> list[PairScore]:
    """Scores of every pair that was tried."""
    return list(read_value(build.directory(NAME) / SCORES, tuple[PairScore, ...]))


def shortlist(build: Build) -> list[PairScore]:
    """The best pairs, at least as many as the bundle steers with."""
    config = build.config.pairing
    return rank_pairs(pair_scores(build))[: max(config.shortlist, config.pairs)]
