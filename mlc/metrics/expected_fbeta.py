"""The labels with the highest expected F-beta, image by image, from nothing but the probabilities: no threshold, and
nothing to tune. What a tuned rule gains over it, it owes to probabilities that are miscalibrated or to labels that are
not independent, which this takes for granted.

Ye, Chai, Lee and Chieu 2012, "Optimizing F-measures: a tale of two approaches", after Lewis 1995: where labels are
independent, the best answer of k labels is the k likeliest, so only k is to be found. It is the same answer as that of
Dembczynski, Waegeman, Cheng and Hullermeier 2011, "An exact algorithm for F-measure maximization", whose table of
P(label i is true and s labels are true) then follows from the marginals.
"""

import math

import numpy as np
from numpy.typing import NDArray

DEPTH = 64  # labels that an answer has at most
CHUNK = 512  # rows at a time: bounds the memory to DEPTH^2 numbers for each


def decide(probabilities: NDArray, beta: float = 1.0, zero_division: float = 0.0) -> NDArray[np.bool_]:
    """bool [N, C]: the best answer of up to DEPTH labels for each row of probabilities [N, C].

    An F-beta of nothing over nothing counts as zero_division. With 0 at least the likeliest label is given unless all
    are impossible; with 1 none is given where that is the best guess.
    Of more than DEPTH classes the least likely count as that many rare events: the number of true ones among them is
    Poisson, with an error in probability below the sum of their squares (Le Cam 1960).
    """
    predicted = np.zeros(probabilities.shape, bool)
    for first in range(0, len(probabilities), CHUNK):
        rows = probabilities[first : first + CHUNK]
        order = np.argsort(-rows, axis=1, kind="stable")[:, :DEPTH]
        likeliest = np.take_along_axis(rows, order, 1).astype(np.float64)
        others = np.maximum(rows.sum(1, dtype=np.float64) - likeliest.sum(1), 0) * (rows.shape[1] > DEPTH)
        size = expected_values(likeliest, beta, others, zero_division).argmax(1)
        np.put_along_axis(predicted[first : first + CHUNK], order, np.arange(order.shape[1]) < size[:, None], 1)
    return predicted


def expected_values(
    falling: NDArray, beta: float, others: NDArray | None = None, zero_division: float = 0.0
) -> NDArray[np.float64]:
    """[N, D + 1]: the expected F-beta of the first 0, 1, ..., D labels, whose probabilities fall, [N, D].

    others: how many of the labels beyond these are true on average, [N]; none without it.
    """
    rows, depth = falling.shape
    remaining = _remaining(falling, np.zeros(rows) if others is None else others)
    chosen = np.zeros((rows, depth + 1))  # [N, a]: the probability that a of the first k are true
    chosen[:, 0] = 1
    values = np.zeros((rows, depth + 1))
    values[:, 0] = zero_division * remaining[:, 0, 0]  # no label given: right if none is true
    true_left = np.arange(remaining.shape[2])[:, None]
    for k in range(1, depth + 1):
        chosen = _with_one_more(chosen, falling[:, k - 1])
        hits = np.arange(k + 1)
        gain = (1 + beta**2) * hits / (k + beta**2 * (hits + true_left))  # [b, a]: F-beta of a hits, b missed
        values[:, k] = ((remaining[:, k] @ gain) * chosen[:, : k + 1]).sum(1)
    return values


def _remaining(falling: NDArray, others: NDArray) -> NDArray[np.float64]:
    """[N, D + 1, B]: the probability that b of the labels after the first k are true."""
    rows, depth = falling.shape
    many = others.max(initial=0)
    room = math.ceil(many + 8 * math.sqrt(many) + 8) if many > 0 else 0  # beyond: less than a rounding
    counts = np.arange(room + 1)
    remaining = np.zeros((rows, depth + 1, depth + room + 1))
    log_factorial = np.array([math.lgamma(count + 1) for count in counts])
    log_mean = np.log(np.maximum(others, 1e-300))[:, None]
    remaining[:, depth, : room + 1] = np.exp(counts * log_mean - others[:, None] - log_factorial)
    for k in range(depth, 0, -1):
        remaining[:, k - 1] = _with_one_more(remaining[:, k], falling[:, k - 1])
    return remaining


def _with_one_more(distribution: NDArray, probability: NDArray) -> NDArray:
    """Of a number of true labels, [N, B], when one more is true with a probability [N]."""
    p = probability[:, None]
    grown = (1 - p) * distribution
    grown[:, 1:] += p * distribution[:, :-1]
    return grown
