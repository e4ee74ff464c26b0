"""Which labels of a training set are likely to be wrong, from predictions by models that did not see them.

Everything here is about entries, one per image and class: given 1 where the image has the class, else 0. A wrong label
is an entry that the data set gives and the model, confidently, does not.
"""

import numpy as np
from numpy.typing import NDArray

METHODS = ("relative", "error", "class", "confident")
SMALLEST = 1e-6  # a probability counts as no nearer to 0 or 1


def errors(probabilities: NDArray, given: NDArray) -> NDArray[np.float32]:
    """[N, C] in 0..1: how far a prediction is from its label, |given - p|; probabilities [N, C], given bool [N, C]."""
    return np.where(given, 1 - probabilities, probabilities).astype(np.float32)


def mean_errors(error: NDArray, given: NDArray) -> NDArray[np.float64]:
    """[2, C]: the mean error of each class's entries that are not given, and of those that are; nan where none is."""
    total = np.stack([np.where(given == side, error, 0).sum(0, dtype=np.float64) for side in (False, True)])
    count = np.stack([(given == side).sum(0) for side in (False, True)])
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def by_class(error: NDArray, given: NDArray) -> NDArray[np.float32]:
    """[N, C]: the error in units of its class's mean error on the same side (given or not), so that a class which is
    hard to learn does not fill the top of the list."""
    mean = mean_errors(error, given)
    return (error / np.maximum(np.where(given, mean[1], mean[0]), 1e-6)).astype(np.float32)


def margins(error: NDArray, given: NDArray) -> NDArray[np.float32]:
    """[N, C]: by how much the probability of the other side exceeds what is confident for it; above 0 it is confident.

    Confident for a side is the mean probability that entries given on it have on it (Northcutt, Jiang, Chuang 2021,
    "Confident learning", section 3.1, one class against the rest). A class without entries on a side is never confident
    of it.
    """
    confident = 1 - mean_errors(error, given)
    other = np.nan_to_num(np.where(given, confident[0], confident[1]), nan=2.0)
    return (error - other).astype(np.float32)


def suspects(error: NDArray, given: NDArray) -> NDArray[np.bool_]:
    """[N, C]: the entries off the diagonal of the confident joint: confidently of the other side, and likelier so.

    As in cleanlab's `find_multilabel_issues_per_class(filter_by="confident_learning")`.
    """
    return (margins(error, given) >= 0) & (error > 0.5)


def log_odds(probability: NDArray) -> NDArray[np.float64]:
    p = np.clip(probability, SMALLEST, 1 - SMALLEST).astype(np.float64)
    return np.log(p / (1 - p))


def relative(probabilities: NDArray, given: NDArray) -> NDArray[np.float32]:
    """[N, C]: the log odds that an entry is wrong, up to a constant, if labels are forgotten at one rate and wrong ones
    given as often as their class is found at all.

    A label that is not given: the log odds of its probability. One that is: how far these are below those of the mean
    probability of the images that have it. Of a class that a model cannot tell this mean is the class's prior, so its
    rare images, which are all improbable, are no suspects.
    """
    usual = 1 - mean_errors(errors(probabilities, given), given)[1]
    odds = log_odds(probabilities)
    return np.where(given, log_odds(np.nan_to_num(usual)) - odds, odds).astype(np.float32)


def scores(probabilities: NDArray, given: NDArray, method: str) -> NDArray[np.float32]:
    """[N, C]: higher is more likely wrong; method is one of METHODS. `confident`: the suspects first (scores from 1 to
    2), then the others, each by their error."""
    if method == "relative":
        return relative(probabilities, given)
    error = errors(probabilities, given)
    if method == "error":
        return error
    return by_class(error, given) if method == "class" else error + suspects(error, given)
