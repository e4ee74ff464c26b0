"""A model on top of models: rows are (image, class), columns are what all models say about it and what is known of it.

Everything that is learnt here (frequencies, which labels go together, neighbours, the models) comes from the rows that
`SecondLevel` is given, so that whoever holds rows back gets an honest prediction of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors

PRIOR = 10.0  # rows of prior knowledge in a frequency
TINY = 1e-6
CHUNK = 4096  # images whose columns are made together
INNER = 3  # folds in which the weights of the parts are found


@dataclass(frozen=True)
class Inputs:
    """What is known of n images before the second level: `probabilities` float [M, n, C] of M models, `groups` int [C],
    and if there are any `extra` float [n, E] and `vectors` float [n, D]."""

    probabilities: NDArray
    groups: NDArray
    extra: NDArray | None = None
    vectors: NDArray | None = None

    def __len__(self) -> int:
        return self.probabilities.shape[1]

    def rows(self, chosen: NDArray | slice) -> "Inputs":
        extra = None if self.extra is None else self.extra[chosen]
        vectors = None if self.vectors is None else self.vectors[chosen]
        return Inputs(self.probabilities[:, chosen], self.groups, extra, vectors)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[n, C]: the plain average of the models, which the second level has to beat."""
        return self.probabilities.mean(0, dtype=np.float64)


# ---- columns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Of the training images: each class's `prior` [C], its mean prediction [C], and P(column | row) [C, C]."""

    prior: NDArray
    predicted: NDArray
    together: NDArray

    @classmethod
    def of(cls, inputs: Inputs, target: NDArray) -> "Statistics":
        """target bool [n, C]. Frequencies are drawn to the class's own as if `PRIOR` more images had been seen."""
        given = target.astype(np.float64)
        count = given.sum(0)
        prior = (count + 0.5) / (len(given) + 1)
        together = (given.T @ given + PRIOR * prior) / (count[:, None] + PRIOR)
        np.fill_diagonal(together, 0)
        return cls(prior, inputs.mean.mean(0), together)

    def expected(self, mean: NDArray) -> NDArray:
        """[n, C]: the probability of a class by the other classes' probabilities: the mean of P(class | other), each
        other class weighing as much as it is likely to be there."""
        others = mean.sum(1, keepdims=True) - mean
        return (mean @ self.together) / np.maximum(others, TINY)


def columns(inputs: Inputs, facts: Statistics, image: NDArray, label: NDArray) -> NDArray[np.float32]:
    """[R, F]: a row for each pair (image[r], label[r]), int [R] each."""
    p, mean = inputs.probabilities, inputs.mean
    rank = np.argsort(np.argsort(-mean, axis=1, kind="stable"), axis=1)
    group_sum = np.stack([mean[:, inputs.groups == g].sum(1) for g in range(inputs.groups.max() + 1)], 1)
    by_pair = [
        *p,
        p.std(0),
        p.min(0),
        p.max(0),
        mean,
        rank,
        mean / np.maximum(mean.max(1, keepdims=True), TINY),
        facts.expected(mean),
        group_sum[:, inputs.groups] - mean,
    ]
    by_image = [mean.sum(1), mean.max(1), *([] if inputs.extra is None else inputs.extra.T)]
    by_class = [facts.prior, facts.predicted, inputs.groups]
    found = [table[image, label] for table in by_pair]
    found += [column[image] for column in by_image] + [column[label] for column in by_class]
    return np.stack(found, 1).astype(np.float32)


def candidates(mean: NDArray, most: int) -> tuple[NDArray, NDArray]:
    """(image, label), int [R] each: the `most` likeliest classes of each image, all where there are no more."""
    if most >= mean.shape[1]:
        return tuple(axis.reshape(-1) for axis in np.indices(mean.shape))
    best = np.argpartition(-mean, most - 1, axis=1)[:, :most]
    return np.repeat(np.arange(len(mean)), most), best.reshape(-1)


def table_of(inputs: Inputs, facts: Statistics, most: int) -> tuple[NDArray, NDArray, NDArray]:
    """(image, label, columns) of all candidates; a chunk of images at a time, to bound the memory."""
    found = []
    for first in range(0, len(inputs), CHUNK):
        chunk = inputs.rows(slice(first, first + CHUNK))
        image, label = candidates(chunk.mean, most)
        found.append((image + first, label, columns(chunk, facts, image, label)))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


# ---- parts -----------------------------------------------------------------------------------------------------------

Part = Callable[[Inputs], NDArray]  # -> probabilities [n, C]


def _kept(inputs: Inputs) -> NDArray:
    """The mean of the models, where there is nothing to learn."""
    return inputs.mean


def boosted(inputs: Inputs, target: NDArray, *, make: Callable, most: int) -> Part:
    """Gradient boosting over (image, class); what is no candidate keeps the mean of the models."""
    facts = Statistics.of(inputs, target)
    image, label, table = table_of(inputs, facts, most)
    true = target[image, label]
    if true.all() or not true.any():  # such as a rare class that is no candidate where it is true
        return _kept
    model = make().fit(table, true)

    def predict(new: Inputs) -> NDArray:
        image, label, table = table_of(new, facts, most)
        found = new.mean
        found[image, label] = model.predict_proba(table)[:, 1]
        return found

    return predict


def ridge(inputs: Inputs, target: NDArray) -> Part:
    """Linear from the logits of all models and classes to every class: what one class says about another."""

    def logits(inputs: Inputs) -> NDArray:
        p = np.clip(inputs.probabilities, 1e-4, 1 - 1e-4)
        return np.concatenate(np.log(p / (1 - p)), axis=1)

    model = Ridge(alpha=len(target) / 10).fit(logits(inputs), target.astype(np.float64))
    return lambda new: np.clip(model.predict(logits(new)).reshape(len(new), -1), 0, 1)


def nearest(inputs: Inputs, target: NDArray, *, k: int) -> Part:
    """The labels of the k images with the most similar vectors (cosine), weighted by their similarity."""
    search = NearestNeighbors(n_neighbors=min(k, len(inputs)), metric="cosine").fit(inputs.vectors)

    def predict(new: Inputs) -> NDArray:
        distance, which = search.kneighbors(new.vectors)
        weight = np.maximum(1 - distance, TINY)
        weight /= weight.sum(1, keepdims=True)
        return sum(weight[:, [j]] * target[which[:, j]] for j in range(which.shape[1]))

    return predict


def maker(kind: str, seed: int) -> Callable:
    """`hist`: scikit-learn's HistGradientBoostingClassifier; `lightgbm`: LGBMClassifier, an extra."""
    if kind == "hist":
        return lambda: HistGradientBoostingClassifier(
            max_iter=100, learning_rate=0.1, min_samples_leaf=50, l2_regularization=1.0, random_state=seed
        )
    from lightgbm import LGBMClassifier

    settings = {"n_estimators": 100, "min_child_samples": 50, "reg_lambda": 1.0, "random_state": seed}
    # n_jobs 0: as many threads as OpenMP is told; by default all cores, which wait for each other where others run.
    return lambda: LGBMClassifier(**settings, deterministic=True, n_jobs=0, verbose=-1)


# ---- blended ---------------------------------------------------------------------------------------------------------


def blend_weights(parts: Sequence[NDArray], target: NDArray) -> NDArray[np.float64]:
    """[K], at least 0 and 1 together: those of the weighted mean of K predictions [n, C] with the
    least log loss; without classes, C = 0, all is given to the first."""
    if not target.size:
        return np.eye(len(parts))[0]
    table = np.stack([part.reshape(-1) for part in parts])
    true = target.reshape(-1)

    def loss(weights: NDArray) -> tuple[float, NDArray]:
        p = np.clip(weights @ table, TINY, 1 - TINY)
        slope = np.where(true, -1 / p, 1 / (1 - p)) / len(true)
        return float(-np.log(np.where(true, p, 1 - p)).mean()), table @ slope

    begin = np.full(len(table), 1 / len(table))
    bounds, together = [(0, 1)] * len(table), {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    found = minimize(loss, begin, jac=True, method="SLSQP", bounds=bounds, constraints=[together]).x
    return np.clip(found, 0, None) / np.clip(found, 0, None).sum()


class SecondLevel:
    """The parts, fitted on all rows, and their weights, found on rows that they had not seen."""

    def __init__(self, inputs: Inputs, target: NDArray, *, kind: str, most: int, k: int, seed: int):
        """target bool [n, C], every class with both sides, C may be 0; `most`, `k`: see `candidates`
        and `nearest`."""
        self._fits: dict[str, Callable[[Inputs, NDArray], Part]] = {
            "boosting": lambda rows, y: boosted(rows, y, make=maker(kind, seed), most=most),
            "ridge": ridge,
        }
        if inputs.vectors is not None:
            self._fits["neighbours"] = lambda rows, y: nearest(rows, y, k=k)
        held_out = {name: np.empty(target.shape) for name in self.names}
        for train, held in KFold(INNER, shuffle=True, random_state=seed).split(target):
            fitted = self._fit(inputs.rows(train), target[train])
            for name, part in self._predict(fitted, inputs.rows(held)).items():
                held_out[name][held] = part
        self.weights = blend_weights([held_out[name] for name in self.names], target)
        self._parts = self._fit(inputs, target)

    @property
    def names(self) -> list[str]:
        return ["mean", *self._fits]

    def _fit(self, inputs: Inputs, target: NDArray) -> dict[str, Part]:
        learnt = target.shape[1] > 0
        return {name: fit(inputs, target) if learnt else _kept for name, fit in self._fits.items()}

    @staticmethod
    def _predict(parts: dict[str, Part], inputs: Inputs) -> dict[str, NDArray]:
        return {"mean": inputs.mean} | {name: part(inputs) for name, part in parts.items()}

    def __call__(self, inputs: Inputs) -> dict[str, NDArray]:
        """{part: probabilities [n, C]}, and their weighted mean as `stack`."""
        found = self._predict(self._parts, inputs)
        stack = sum(weight * found[name] for weight, name in zip(self.weights, self.names, strict=True))
        return found | {"stack": stack}
