"""The second level: its columns by brute force, its parts against scikit-learn and definitions, nothing from held-out
rows in it."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.neighbors import KNeighborsRegressor

from mlc.post.second_level import (
    PRIOR,
    Inputs,
    SecondLevel,
    Statistics,
    blend_weights,
    candidates,
    columns,
    nearest,
    table_of,
)

GROUPS = np.array([0, 0, 1, 1, 1])


def world(seed: int, n: int = 240, models: int = 2) -> tuple[Inputs, np.ndarray]:
    """Labels 0 and 2 go together; models see the truth through noise; the vectors know label 3."""
    rng = np.random.default_rng(seed)
    target = rng.random((n, 5)) < [0.5, 0.3, 0.2, 0.3, 0.1]
    target[:, 2] |= target[:, 0] & (rng.random(n) < 0.8)
    p = expit(rng.normal(0, 1.5, (models, n, 5)) + 2.0 * target - 1)
    vectors = rng.normal(0, 0.3, (n, 4)) + np.where(target[:, [3]], [2, 0, 0, 0], [0, 2, 0, 0])
    return Inputs(p, GROUPS, rng.random((n, 2)), vectors.astype(np.float32)), target


def test_columns_by_brute_force():
    inputs, target = world(0, n=60)
    facts = Statistics.of(inputs, target)
    image, label = candidates(inputs.mean, 99)
    found = columns(inputs, facts, image, label)
    p, mean = inputs.probabilities, inputs.probabilities.mean(0)
    for row in range(0, len(image), 7):
        i, c = image[row], label[row]
        others = [j for j in range(5) if j != c]
        n = {j: target[:, j].sum() for j in range(5)}
        prior = (n[c] + 0.5) / 61
        together = {j: ((target[:, c] & target[:, j]).sum() + PRIOR * prior) / (n[j] + PRIOR) for j in others}
        by_others = sum(mean[i, j] * together[j] for j in others) / sum(mean[i, j] for j in others)
        same_group = sum(mean[i, j] for j in others if GROUPS[j] == GROUPS[c])
        expected = [
            *p[:, i, c],
            p[:, i, c].std(),
            p[:, i, c].min(),
            p[:, i, c].max(),
            mean[i, c],
            sum(mean[i, j] > mean[i, c] for j in range(5)),
            mean[i, c] / mean[i].max(),
            by_others,
            same_group,
            mean[i].sum(),
            mean[i].max(),
            *inputs.extra[i],
            prior,
            mean[:, c].mean(),
            GROUPS[c],
        ]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_only_the_likeliest_classes_are_looked_at(monkeypatch):
    inputs, target = world(1, n=50)
    monkeypatch.setattr("mlc.post.second_level.CHUNK", 16)
    facts = Statistics.of(inputs, target)
    image, label, table = table_of(inputs, facts, 2)
    assert len(table) == 100
    for i in range(50):
        assert set(label[image == i]) == set(np.argsort(-inputs.mean[i])[:2])
    whole = dict(zip(zip(*candidates(inputs.mean, 9), strict=True), range(250), strict=True))
    every = columns(inputs, facts, *candidates(inputs.mean, 9))
    assert all(np.array_equal(table[r], every[whole[image[r], label[r]]]) for r in range(100))


def test_neighbours_are_scikit_learns_weighted_by_similarity():
    inputs, target = world(2)
    new = world(3)[0]
    model = KNeighborsRegressor(7, metric="cosine", weights=lambda d: np.maximum(1 - d, 1e-6))
    expected = model.fit(inputs.vectors, target.astype(float)).predict(new.vectors)
    np.testing.assert_allclose(nearest(inputs, target, k=7)(new), expected, rtol=1e-6)


def test_blend_weights_are_the_best_on_a_grid():
    inputs, target = world(4, models=2)
    parts = [*inputs.probabilities, np.full(target.shape, target.mean())]

    def loss(w):
        p = np.clip(sum(x * part for x, part in zip(w, parts, strict=True)), 1e-6, 1 - 1e-6)
        return -np.log(np.where(target, p, 1 - p)).mean()

    found = blend_weights(parts, target)
    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(21) for b in range(21 - a)]
    assert loss(found) <= min(map(loss, grid)) + 1e-9 and found.sum() == pytest.approx(1) and (found >= 0).all()


def test_it_is_better_than_the_mean_on_rows_that_it_never_saw():
    (inputs, target), (new, truth) = world(5, n=600), world(6, n=600)
    level = SecondLevel(inputs, target, kind="hist", most=64, k=20, seed=0)
    found = level(new)

    def loss(p):
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return -np.log(np.where(truth, p, 1 - p)).mean()

    assert list(found) == ["mean", "boosting", "ridge", "neighbours", "stack"]
    assert loss(found["stack"]) < loss(found["mean"]) - 0.05
    assert loss(found["stack"]) <= min(loss(found[name]) for name in level.names) + 0.01
    again = SecondLevel(inputs, target, kind="hist", most=64, k=20, seed=0)(new)
    assert np.array_equal(again["stack"], found["stack"])


def test_lightgbm_takes_its_place():
    pytest.importorskip("lightgbm")
    (inputs, target), (new, truth) = world(5, n=400), world(6, n=300)
    found = SecondLevel(inputs, target, kind="lightgbm", most=64, k=20, seed=0)(new)
    assert ((found["boosting"] > 0.5) == truth).mean() > ((found["mean"] > 0.5) == truth).mean()
