"""Which labels of a training set are likely to be wrong, from predictions by models that did not see them.

Everything here is about entries, one per image and class: given 1 where the image has the class, else 0. A wrong label
is an entry that the data set gives and the model, confidently, does not.
"""

import numpy as np
from numpy.typing import NDArray

METHODS = ("error", "class", "confident")


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


def scores(probabilities: NDArray, given: NDArray, method: str) -> NDArray[np.float32]:
    """[N, C]: higher is more likely wrong; method is one of METHODS. `confident`: the suspects first (scores from 1 to
    2), then the others, each by their error."""
    error = errors(probabilities, given)
    if method == "error":
        return error
    return by_class(error, given) if method == "class" else error + suspects(error, given)
