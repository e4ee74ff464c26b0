"""The split against what it promises in closed form, and against splits drawn at random."""

import numpy as np
import pytest

from shards.split import stratified_folds, subset_sizes


def draw(samples, shares, seed=0):
    return [np.flatnonzero(row) for row in np.random.RandomState(seed).rand(samples, len(shares)) < shares]


def excess(labels, classes, subset, fractions):
    """[K, C]: samples of a class in a subset above the exact share of it."""
    hot = np.zeros((len(labels), classes))
    for row, columns in enumerate(labels):
        hot[row, columns] = 1
    return np.stack([hot[subset == k].sum(0) - share * hot.sum(0) for k, share in enumerate(fractions)])


FEW = np.array([0.76, 0.15, 0.07, 0.05, 0.03, 0.01, 0.004])  # mostly one label per sample, long tail
MANY = np.linspace(0.02, 0.7, 18)  # six labels per sample
CASES = [(FEW, [0.9, 0.1]), (FEW, [0.2] * 5), (MANY, [0.9, 0.1]), (MANY, [0.2] * 5), (MANY, [0.5, 0.3, 0.2])]


@pytest.mark.parametrize(("shares", "fractions"), CASES)
def test_sizes_are_exact_and_every_label_keeps_its_share(shares, fractions):
    labels = draw(3000, shares)
    subset = stratified_folds(labels, fractions, 0)
    assert np.abs(np.bincount(subset) - 3000 * np.array(fractions)).max() < 1
    assert np.abs(excess(labels, len(shares), subset, fractions)).max() < 2.5


@pytest.mark.parametrize(("shares", "fractions"), CASES)
def test_far_better_than_random(shares, fractions):
    labels = draw(3000, shares)
    subset = stratified_folds(labels, fractions, 0)
    ours = np.abs(excess(labels, len(shares), subset, fractions)).mean()
    random = [
        np.abs(excess(labels, len(shares), np.random.RandomState(s).permutation(subset), fractions)).mean()
        for s in range(5)
    ]
    assert ours < 0.25 * min(random)


def test_a_label_with_one_sample_per_fold_is_in_every_fold():
    labels = [[0, 1]] * 5 + [[0]] * 45 + [[]] * 50
    subset = stratified_folds(labels, [0.2] * 5, 3)
    assert sorted(subset[:5]) == [0, 1, 2, 3, 4]
    assert np.bincount(subset[:50]).tolist() == [10] * 5
    assert np.bincount(subset[50:]).tolist() == [10] * 5  # samples without labels are dealt out as well


def test_the_seed_decides():
    labels = draw(500, FEW)
    first = stratified_folds(labels, [0.2] * 5, 0)
    assert (first == stratified_folds(labels, [0.2] * 5, 0)).all()
    assert (first != stratified_folds(labels, [0.2] * 5, 1)).any()


def test_the_split_of_a_data_set_never_changes():
    """Frozen: a published validation score is about these very samples."""
    assert stratified_folds(draw(24, MANY), [0.75, 0.25], 0).nonzero()[0].tolist() == [0, 3, 8, 13, 16, 21]


def test_nothing_to_split():
    assert stratified_folds([], [0.9, 0.1], 0).tolist() == []
    assert sorted(stratified_folds([[], []], [0.5, 0.5], 0)) == [0, 1]
    assert (stratified_folds([[0], [1]], [1.0], 0) == 0).all()


@pytest.mark.parametrize("samples", [0, 1, 7, 100, 101])
@pytest.mark.parametrize("fractions", [[1], [0.9, 0.1], [1, 1, 1], [0.5, 0.3, 0.2]])
def test_sizes_add_up_and_are_within_one(samples, fractions):
    sizes = subset_sizes(samples, fractions)
    assert sizes.sum() == samples
    assert np.abs(sizes - samples * np.array(fractions) / sum(fractions)).max() < 1


@pytest.mark.parametrize(("shares", "fractions"), CASES)
def test_a_group_stays_together_and_labels_keep_their_shares(shares, fractions):
    """Half of the samples alone, the others in groups of two to five."""
    labels = draw(3000, shares)
    groups = np.concatenate([np.arange(1500), 1500 + np.sort(np.random.RandomState(1).randint(0, 450, 1500))])
    groups = groups[np.random.RandomState(2).permutation(3000)]
    subset = stratified_folds(labels, fractions, 0, groups)
    assert all(len(set(subset[groups == group])) == 1 for group in np.unique(groups))
    assert np.abs(np.bincount(subset) - 3000 * np.array(fractions)).max() < np.bincount(groups).max()
    assert np.abs(excess(labels, len(shares), subset, fractions)).max() < 5
    assert (stratified_folds(labels, fractions, 0, np.arange(3000)) == stratified_folds(labels, fractions, 0)).all()


def test_a_group_larger_than_a_subset_goes_where_it_fits_best():
    subset = stratified_folds([[0]] * 10, [0.9, 0.1], 0, [0] * 8 + [1, 2])
    assert len(set(subset[:8])) == 1 and np.bincount(subset, minlength=2)[0] >= 8
    assert (stratified_folds([[0]] * 4, [0.5, 0.5], 0, [7] * 4) >= 0).all()
