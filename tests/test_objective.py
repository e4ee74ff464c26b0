"""Which columns take part in the loss, with which loss and how much; against the same put together by hand."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mlc.config import Config
from mlc.objective import ClassCounts, Objective, loss_weights, make_loss, trained_columns
from mlc.optim.losses import LOSSES, asl, bce, class_weights, distribution_balanced, focal, soft_fbeta, two_way, zlpr
from shards.console import UserError

GROUPS = {"culture": [0, 2, 5], "tag": [1, 4]}  # column 3 is in no group
CPU = torch.device("cpu")
COUNTS = np.array([100.0, 3.0, 0.0, 20.0, 7.0, 1000.0])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(7, 6, generator=generator), torch.rand(7, 6, generator=generator).round()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"loss": "bce"}, bce),
        ({"loss": "focal", "focal_gamma": 1.5, "focal_alpha": 0.3}, lambda x, t: focal(x, t, 1.5, 0.3)),
        (
            {"loss": "asl", "asl_gamma_neg": 3.0, "asl_gamma_pos": 1.0, "asl_clip": 0.1},
            lambda x, t: asl(x, t, 3, 1, 0.1),
        ),
        ({"loss": "two-way", "two_way_temp": 2.0}, lambda x, t: two_way(x, t, 2.0)),
        ({"loss": "zlpr"}, zlpr),
        ({"loss": "soft-fbeta", "fbeta": 2.0}, lambda x, t: soft_fbeta(x, t, 2.0)),
    ],
)
def test_every_loss_has_its_settings(batch, settings, expected):
    torch.testing.assert_close(make_loss(Config(**settings), GROUPS)(*batch), expected(*batch))
    assert settings["loss"] in LOSSES


@pytest.mark.parametrize("columns", [slice(None), [1, 4]])
def test_the_balanced_loss_knows_how_often_its_classes_come(batch, columns):
    logits, target = batch
    settings = {"loss": "db"} if columns == slice(None) else {"group_loss": {"tag": "db"}}
    config = Config(**settings, smoothing=0.1, db_map=(0.2, 5.0, 0.3), db_neg_scale=3.0, db_bias=0.1, db_gamma=1.0)
    loss = make_loss(config, GROUPS, ClassCounts(COUNTS, 1000.0))(logits, target)
    often = torch.tensor([100.0, 3, 1, 20, 7, 999])[columns] / 1000  # never and always are impossible frequencies
    own = logits[:, columns], target[:, columns]
    torch.testing.assert_close(loss[:, columns], distribution_balanced(*own, often, (0.2, 5, 0.3), 3, 0.1, 1, 0.1))


def test_weights_of_positives_are_trained_with_and_not_measured_with(batch):
    logits, target = batch
    config = Config(pos_weight="balanced", pos_weight_max=30.0, group_loss={"tag": "focal"}, smoothing=0.1)
    made = [make_loss(config, GROUPS, ClassCounts(COUNTS, 1000.0), pos_weight=on) for on in (False, True)]
    objective = Objective(config, loss=made[0], weighted=made[1], autocast=nullcontext)
    total, _ = objective(lambda image: logits, torch.zeros(1), target, {}, None)
    weights = torch.tensor([9.0, 30, 1, 30, 30, 1])  # 900 / 100, three above the most, none and all positive
    labels = 0.9 * target + 0.05
    other, tag = [0, 2, 3, 5], [1, 4]
    expected = bce(logits[:, other], labels[:, other], weights[other]).sum()
    expected += focal(logits[:, tag], labels[:, tag], pos_weight=weights[tag]).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(objective.loss(logits, target)[:, other], bce(logits, target)[:, other])


@pytest.mark.parametrize("name", ["focal", "two-way", "zlpr", "soft-fbeta"])
def test_a_groups_loss_sees_its_columns_alone(batch, name):
    logits, target = batch
    loss = make_loss(Config(group_loss={"tag": name}), GROUPS)(logits, target)
    torch.testing.assert_close(loss[:, [0, 2, 3, 5]], bce(logits, target)[:, [0, 2, 3, 5]])
    torch.testing.assert_close(loss[:, [1, 4]], LOSSES[name](logits[:, [1, 4]], target[:, [1, 4]]))


def test_with_groups_the_others_do_not_matter(batch):
    logits, target = batch
    config = Config(loss="two-way", groups=["tag"])
    weights = loss_weights(config, GROUPS, COUNTS, CPU)
    objective = Objective(config, loss=make_loss(config, GROUPS), autocast=nullcontext, weights=weights)
    logits.requires_grad_()
    total, _ = objective(lambda image: logits, torch.zeros(1), target, {}, None)
    total.backward()
    columns = trained_columns(config, GROUPS, 6)
    assert columns == [1, 4] and (logits.grad[:, [0, 2, 3, 5]] == 0).all() and (logits.grad[:, columns] != 0).any()
    expected = two_way(logits[:, columns], target[:, columns]).mean().item()
    assert total.item() / (len(logits) * len(columns)) == pytest.approx(expected, rel=1e-6)


def test_weights_of_classes_and_groups():
    def weights(**settings):
        return loss_weights(Config(**settings), GROUPS, COUNTS, CPU)

    assert weights() is None and weights(group_loss={"tag": "focal"}) is None
    assert weights(groups=["tag"]).tolist() == [0, 1, 0, 0, 1, 0]
    assert weights(groups=["tag", "culture"]).tolist() == [1, 1, 1, 0, 1, 1]
    assert weights(group_weight={"tag": 0.5, "culture": 2.0}).tolist() == [2, 0.5, 2, 1, 0.5, 2]
    torch.testing.assert_close(weights(weighted_loss="inverse"), class_weights(torch.tensor(COUNTS), "inverse"))
    own = weights(weighted_loss="effective", weighted_beta=0.9, groups=["culture"], group_weight={"culture": 3.0})
    expected = 3 * class_weights(torch.tensor(COUNTS[[0, 2, 5]]), "effective", 0.9)
    torch.testing.assert_close(own[[0, 2, 5]], expected)
    assert own[[1, 3, 4]].tolist() == [0, 0, 0] and own.mean().item() == pytest.approx(3 * 3 / 6)


def test_weights_scale_the_columns_of_the_loss_and_its_sum(batch):
    logits, target = batch
    config = Config(weighted_loss="inverse", group_weight={"tag": 0.25}, group_loss={"tag": "focal"})
    loss, weights = make_loss(config, GROUPS), loss_weights(config, GROUPS, COUNTS, CPU)
    total, _ = Objective(config, loss=loss, autocast=nullcontext, weights=weights)(
        lambda image: logits, torch.zeros(1), target, {}, None
    )
    torch.testing.assert_close(total, (loss(logits, target).sum(0) * weights).sum())


def test_a_group_without_classes_cannot_be_trained():
    with pytest.raises(UserError, match="--groups none: there are no classes in it"):
        loss_weights(Config(groups=["none"]), {"none": []}, COUNTS, CPU)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"group_loss": {"tags": "focal"}}, "--group-loss tags: no such group; did you mean tag?; choose one of cult"),
        ({"group_loss": {"tag": "fokal"}}, "--group-loss fokal: no such loss; did you mean focal?; choose one of bce"),
        ({"group_weight": {"x": 1.0}}, "--group-weight x: no such group; choose one of culture, tag"),
        ({"groups": ["cultur"]}, "--groups cultur: no such group; did you mean culture?"),
    ],
)
def test_unknown_names_are_one_line(settings, words):
    config = Config(**settings)
    with pytest.raises(UserError) as error:
        make_loss(config, GROUPS)
        loss_weights(config, GROUPS, COUNTS, CPU)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"the data set has no groups|no such loss"):
        make_loss(config, {})
        loss_weights(config, {}, COUNTS, CPU)
