"""What can be had without looking at a single sample: always the same labels, or scores by chance. A model below that
has learnt nothing, however its numbers look.
"""

import numpy as np
from numpy.typing import NDArray


def constant_f1(
    order: NDArray, columns: NDArray, owner: NDArray, rows: int, zero_division: float = 0.0
) -> NDArray[np.float64]:
    """[C + 1]: the mean over samples of F1 where every sample gets the first k classes of `order`, k = 0 to C.

    order int [C]: all classes, as they are taken; columns, owner int [L]: class and sample (below `rows`) of each true
    label; zero_division is the F1 of a sample without labels at k = 0. Exact: a label at place r of the order is a hit
    for each k > r, worth 2 / (k + labels of its sample). Time: a sort of the labels, and C for each number of labels
    that samples have.
    """
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    each = np.bincount(owner, minlength=rows)
    size = np.arange(len(order) + 1)
    total = np.zeros(len(order) + 1)
    total[0] = zero_division * np.count_nonzero(each == 0)
    by_size = np.argsort(each[owner], kind="stable")  # samples with as many labels share the denominator
    sizes, starts = np.unique(each[owner[by_size]], return_index=True)
    for labels, own in zip(sizes, np.split(by_size, starts[1:]), strict=False):
        hits = np.bincount(place[columns[own]] + 1, minlength=len(order) + 1).cumsum()
        total += 2 * hits / (size + labels)
    return total / max(1, rows)


def best_constant(
    frequencies: NDArray, columns: NDArray, owner: NDArray, rows: int, zero_division: float = 0.0
) -> tuple[int, float]:
    """(k, sample-F1) of always the k commonest classes, for the best k of 0 to C; the smallest of equals.

    frequencies [C]: how common they are, for instance in training. k is chosen on these very labels, as the threshold
    of `f1_samples@tuned` is, so the value is an upper bound of what such a rule reaches elsewhere.
    """
    order = np.argsort(-np.asarray(frequencies), kind="stable")
    values = constant_f1(order, columns, owner, rows, zero_division)
    best = int(values.argmax())
    return best, float(values[best])


def chance_map(columns: NDArray, rows: int) -> float:
    """What mAP tends to where scores say nothing: the mean over the classes that come of the share of samples that have
    them; nan where none does. columns int [L]: the class of each true label."""
    _, counts = np.unique(columns, return_counts=True)
    return float(counts.mean() / rows) if len(counts) else float("nan")
