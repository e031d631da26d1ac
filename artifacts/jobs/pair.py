"""Step 4: which layers are paired, by mutual information, by depth, or by trying the pairs on the tuning split."""

from collections.abc import Sequence

from torch import Tensor

from artifacts.jobs.align import align_scores
from artifacts.jobs.build import Build
from artifacts.jobs.capture import layer_norms, store
from artifacts.jobs.direction import DirectionFitter, kinds
from artifacts.jobs.errors import BuildError
from artifacts.jobs.progress import progress
from artifacts.jobs.trials import budget_of, try_strengths
from artifacts.jobs.workdir import file_digest, read_tensors, read_value, write_tensors, write_value
from artifacts.pairing.held_out import PairScore, rank_pairs, score_pair
from artifacts.pairing.information import ROWS_PER_COMPONENT, LayerInformation, layer_information, whiten_layer
from artifacts.pairing.select import LayerPair, first_of_each, pairs_by_depth, pairs_by_information
from artifacts.vectors.score import SignError

NAME = "pair"
SCORES = "scores.json"
ORDER = "order.json"
INFORMATION = "information.safetensors"


def settings(build: Build) -> object:
    """What decides the pairs, apart from aligners and states."""
    tune = build.config.tune
    return {
        "pairing": build.config.pairing.model_dump(),
        "kind": kinds(build)[0].name,
        "vectors": build.config.vectors.model_dump(include={"components", "iterations", "sign"}),
        "tune": [tune.objective, tune.perplexity_budget, tune.retention_budget],
        "data": {name: file_digest(path) for name, path in build.data_files.items() if name not in ("mapping", "test")},
    }


def run(build: Build) -> None:
    """Measure the mutual information of all pairs, order the pairs, and try those that the method asks for.

    Raises:
        BuildError: no pair is left.
    """
    directory = build.directory(NAME)
    method = build.config.pairing.method
    information = _information(build)
    measured = {} if information is None else {name: getattr(information, name).clone() for name in ("value", "p", "q")}
    write_tensors(directory / INFORMATION, measured)
    accepted = [LayerPair(score.expert, score.target) for score in align_scores(build) if score.accepted]
    order = _order(build, information, accepted)
    tried = accepted if method == "held-out" else order[: _shortlist_size(build)]
    scores = _try(build, tried)
    write_value(directory / SCORES, tuple[PairScore, ...], tuple(scores))
    ranked = rank_pairs(scores)
    usable = [LayerPair(score.expert, score.target) for score in ranked]
    if not usable:
        raise BuildError(
            f"none of {len(tried)} layer pairs keeps within tune.perplexity_budget "
            f"{build.config.tune.perplexity_budget} and tune.retention_budget {build.config.tune.retention_budget} at "
            f"strength {build.config.pairing.strengths[0]}; add smaller pairing.strengths or raise the budgets"
        )
    # Mutual information and depth decide alone; trying only drops what breaks the budget.
    chosen = usable if method == "held-out" else [pair for pair in order if pair in set(usable)]
    if build.config.pairing.one_to_one:
        chosen = first_of_each(chosen)
    write_value(directory / ORDER, tuple[LayerPair, ...], tuple(chosen[: _shortlist_size(build)]))


def pair_scores(build: Build) -> list[PairScore]:
    """Scores of every pair that was tried."""
    return list(read_value(build.directory(NAME) / SCORES, tuple[PairScore, ...]))


def shortlist(build: Build) -> list[LayerPair]:
    """(expert layer, target layer), best first, at least as many as the bundle steers with."""
    return list(read_value(build.directory(NAME) / ORDER, tuple[LayerPair, ...]))


def load_information(build: Build) -> dict[str, Tensor]:
    """`value`, `p` and `q` of the mutual information, [num_expert_layers, num_target_layers] of the chosen layers.

    Empty when there are fewer mapping texts than the estimator needs.
    """
    return read_tensors(build.directory(NAME) / INFORMATION)


def _shortlist_size(build: Build) -> int:
    return max(build.config.pairing.shortlist, build.config.pairing.pairs)


def _information(build: Build) -> LayerInformation | None:
    """Mutual information of all pairs; None where there are too few texts and nothing depends on it."""
    config = build.config.pairing
    needed = config.method in ("low-mi", "high-mi")
    if len(build.mapping) < ROWS_PER_COMPONENT * config.components and not needed:
        return None

    def whitened(role: str, layers: Sequence[int]) -> list[Tensor]:
        states = store(build, role, "mapping")
        return [whiten_layer(states.layer(layer), config.components, build.config.seed) for layer in layers]

    try:
        return layer_information(
            whitened("expert", build.expert_layers),
            whitened("target", build.target_layers),
            config.permutations,
            build.config.seed,
            lambda steps: progress(steps, "mutual information", build.quiet),
        )
    except ValueError as error:
        raise BuildError(f"pairing.method {config.method}: {error} (pairing.components)") from error


def _order(build: Build, information: LayerInformation | None, accepted: Sequence[LayerPair]) -> list[LayerPair]:
    """Accepted pairs in the order of the method; that of `held-out` is found by trying."""
    config, experts, targets = build.config.pairing, build.expert_layers, build.target_layers
    if config.method == "held-out":
        return list(accepted)
    if config.method == "same-depth":
        depths = build.expert_source.identity.num_layers, build.target_source.identity.num_layers
        ranked = pairs_by_depth(experts, targets, *depths, one_to_one=config.one_to_one)
    else:
        assert information is not None
        try:
            ranked = pairs_by_information(
                information, experts, targets, config.method, config.false_discovery_rate, config.one_to_one
            )
        except ValueError as error:
            raise BuildError(f"pairing.method {config.method}: {error}") from error
    allowed = set(accepted)
    order = [pair for pair in ranked if pair in allowed]
    if not order:
        raise BuildError(
            f"none of the {len(ranked)} pairs that pairing.method {config.method} proposes has an accepted aligner; "
            "use held-out"
        )
    return order


def _try(build: Build, pairs: Sequence[LayerPair]) -> list[PairScore]:
    """Steer through each pair with the simplest of the competing kinds."""
    tuning, norms, tune = build.tuning, layer_norms(build), build.config.tune
    fitter, kind = DirectionFitter(build), kinds(build)[0]
    budget = budget_of(build)
    scores, refused = [], []
    for expert, target in progress(pairs, "try layer pairs", build.quiet):
        try:
            rows = {target: fitter.direction(kind, expert, target) * norms[target]}
        except SignError as error:
            refused.append(error)
            continue
        trials = try_strengths(tuning, rows, build.config.pairing.strengths, budget)
        scores.append(score_pair(expert, target, trials, tuning.unsteered, budget, tune.objective))
    if not scores and refused:
        raise BuildError(f"no direction has a sign ({kind.name} of every pair): {refused[0]}")
    return scores


def information_of(build: Build, found: dict[str, Tensor], pair: LayerPair) -> dict[str, float]:
    """Mutual information of one pair in nats, and its q-value; empty when it was not measured."""
    if not found:
        return {}
    place = build.expert_layers.index(pair[0]), build.target_layers.index(pair[1])
    return {"mi": float(found["value"][place]), "mi_q": float(found["q"][place])}
