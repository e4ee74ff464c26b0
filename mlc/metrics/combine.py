"""Several models' answers to the same samples, put together after all are trained: folds, architectures, image and
caption. Whatever is tuned here is tuned on probabilities that were held out or predicted out of fold; weights tuned on
training data would trust the model that knows it by heart. How much of a tuned score is real, `cross_fitted` says.

Answers are a stack [M, N, C]: models, samples, classes. Weights are [M], or [M, C] for each class its own, and sum to 1
over the models.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.stats import rankdata

from mlc.metrics import multilabel
from mlc.metrics.threshold_search import Metric
from mlc.metrics.thresholds import best_global_threshold

PRIOR = 10.0  # a class's own weights count as if so many samples more had spoken for those of all classes
ROUNDS = 50  # of the greedy search; it ends PATIENCE rounds after its best
PATIENCE = 10
_LEAST = 1e-7  # probability of what happened: one sure and wrong answer must not decide alone
Fit = Callable[[NDArray, NDArray], NDArray]  # stack [M, N, C], target bool [N, C] -> weights


# ---- means -----------------------------------------------------------------------------------------------------------


def mean(stack: NDArray, weights: ArrayLike | None = None) -> NDArray[np.float32]:
    """[N, C]: the weighted arithmetic mean; without weights that of equals."""
    models, samples, classes = stack.shape
    shares = np.full(models, 1 / models) if weights is None else np.asarray(weights, np.float64)
    total = np.zeros((samples, classes), np.float64)
    for answers, share in zip(stack, shares, strict=True):
        total += share * answers
    return np.clip(total, 0, 1).astype(np.float32)


def geometric(stack: NDArray) -> NDArray[np.float32]:
    """[N, C]: the geometric mean; a model that is sure of no rules the label out."""
    with np.errstate(divide="ignore"):
        return np.exp(np.mean([np.log(answers.astype(np.float64)) for answers in stack], axis=0)).astype(np.float32)


def ranks(stack: NDArray) -> NDArray[np.float32]:
    """[M, N, C]: each answer's rank among those of its model to its class, in (0, 1]; equal answers share their mean
    rank. For models whose probabilities mean different things. What a rank says depends on all samples, and common and
    rare classes look alike: good for mAP, and for thresholds of each class, not for one threshold.
    """
    return np.stack([rankdata(answers, axis=0) / len(answers) for answers in stack]).astype(np.float32)


def union(stack: NDArray, thresholds: ArrayLike) -> NDArray[np.bool_]:
    """bool [N, C]: the labels that any model predicts; thresholds [M], or [M, C], each model above its own."""
    pairs = zip(stack, np.asarray(thresholds, stack.dtype), strict=True)
    return np.any([answers > threshold for answers, threshold in pairs], axis=0)


def vote(sets: NDArray, weights: ArrayLike, share: float = 0.5) -> NDArray[np.bool_]:
    """bool [N, C]: the labels for which more than `share` of the weight is; label sets bool [M, N, C], weights [M].

    Two equal votes for different things are no majority for either.
    """
    weights = np.asarray(weights, np.float64)
    return np.tensordot(weights / weights.sum(), sets, axes=1) > share + 1e-12  # 0.1 + 0.2 of 0.6 is a half


# ---- weights ---------------------------------------------------------------------------------------------------------


def tuned(stack: NDArray, target: NDArray) -> NDArray[np.float64]:
    """[M]: the weights whose mean has the least binary cross-entropy, over all samples and classes together.

    Cross-entropy of a weighted mean is convex in the weights, so the optimum is the only one there is (the linear
    opinion pool; Clemen and Winkler 1999).
    """
    return _least(stack, target, np.full(len(stack), 1 / len(stack)))


def tuned_per_class(stack: NDArray, target: NDArray, prior: float = PRIOR) -> NDArray[np.float64]:
    """[M, C]: `tuned` for each class by itself, drawn to the weights of all classes by a Dirichlet prior of that many
    samples, so that a class with three positives does not make up weights of its own."""
    together = tuned(stack, target)
    columns = range(stack.shape[2])
    return np.stack([_least(stack[:, :, [c]], target[:, [c]], together, prior) for c in columns], axis=1)


def greedy(
    stack: NDArray, target: NDArray, metric: str = "f1_samples", zero_division: float = 0.0
) -> NDArray[np.float64]:
    """[M]: from nothing, always add the model that gives the best `metric` of the mean, the same one as often as it is
    the best; the weights are the counts at the best moment (Caruana et al. 2004, "Ensemble selection").

    An F-beta is that at its best single threshold.
    """
    counts, kept, best = np.zeros(len(stack)), np.ones(len(stack)), -1.0
    total = np.zeros(stack.shape[1:], np.float32)
    for size in range(1, ROUNDS + 1):
        means = ((total + answers) / np.float32(size) for answers in stack)
        values = [value(scores, target, metric, zero_division) for scores in means]
        chosen = int(np.argmax(values))
        total += stack[chosen]
        counts[chosen] += 1
        if values[chosen] > best:
            best, kept = values[chosen], counts.copy()
        if size - kept.sum() >= PATIENCE:
            break
    return kept / kept.sum()


def _least(stack: NDArray, target: NDArray, towards: NDArray, prior: float = 0.0) -> NDArray[np.float64]:
    """[M]: the minimum over the simplex of - sum log(w . q) - prior * towards . log(w), q the probability that each
    model gave to what happened."""
    start = 0.99 * towards + 0.01 / len(towards)
    pulls = prior * towards

    def loss(weights: NDArray) -> tuple[float, NDArray]:
        value, slope = 0.0, np.zeros(len(weights))
        for c in range(stack.shape[2]):  # by class, since all of them in float64 would be a second copy of the stack
            told = stack[:, :, c].astype(np.float64)
            told = np.clip(np.where(target[:, c], told, 1 - told), _LEAST, 1)
            mixed = weights @ told
            value -= np.log(mixed).sum()
            slope -= (told / mixed).sum(1)
        held = np.maximum(weights, 1e-12)
        return value - pulls @ np.log(held), slope - pulls / held

    first = max(abs(loss(start)[0]), 1e-9)
    found = minimize(
        lambda weights: tuple(part / first for part in loss(weights)),
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(start),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 200},
    ).x
    found = np.clip(found, 0, 1) / np.clip(found, 0, 1).sum()
    return min((found, start, towards), key=lambda weights: loss(weights)[0])


# ---- scores ----------------------------------------------------------------------------------------------------------


def value(scores: NDArray, target: NDArray, metric: str, zero_division: float = 0.0) -> float:
    """`map`, or any F-beta (`f2_samples`) at its best single threshold."""
    if metric == "map":
        return multilabel.mean_average_precision(scores, target)
    return best_global_threshold(scores, target, metric, zero_division)[1]


def cross_fitted(
    stack: NDArray,
    target: NDArray,
    fit: Fit,
    metrics: tuple[str, ...],
    folds: int = 5,
    zero_division: float = 0.0,
) -> dict[str, float]:
    """What `fit` and the threshold are worth for samples that they were not made for, {metric: value}.

    The samples are dealt into `folds`, always in the same way; the weights and the threshold for each part come from
    the others. stack [M, N, C] with N >= folds.
    """
    part = np.random.RandomState(0).permutation(stack.shape[1]) % folds
    scores = np.empty(stack.shape[1:], np.float32)
    decided = {metric: np.empty(scores.shape, bool) for metric in metrics if metric != "map"}
    for number in range(folds):
        own, others = part == number, part != number
        weights = fit(stack[:, others], target[others])
        scores[own], known = mean(stack[:, own], weights), mean(stack[:, others], weights)
        for metric, predicted in decided.items():
            threshold = best_global_threshold(known, target[others], metric, zero_division)[0]
            predicted[own] = scores[own] > np.float32(threshold)
    found = {
        metric: multilabel.value_of(Metric.of(metric, zero_division), predicted, target)
        for metric, predicted in decided.items()
    }
    return {metric: found[metric] if metric in found else value(scores, target, metric) for metric in metrics}
