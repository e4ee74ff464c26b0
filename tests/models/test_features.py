"""What enters the classifier is what is compared, in every layout of features; the common width keeps angles."""

import pytest
import timm
import torch
from torch import nn

from mlc.models.features import FeaturePair, PooledFeatures, orthonormal_rows, pooled

MODELS = {
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1},
    "resnet18": {"channels": (8, 8, 16, 16)},
    "efficientnet_lite0": {},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1},
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_makes_the_logits_of_the_features(name):
    model = small(name)
    features = PooledFeatures(model)
    image = torch.randn(2, 3, 32, 32)
    logits, found = model(image), features.take()
    assert found.shape == (2, model.num_features) and found.requires_grad
    classifier = model.get_classifier()
    if isinstance(classifier, tuple):  # of class token and distillation token: the first is compared
        classifier, logits = classifier[0], model.forward_head(model.forward_features(image), pre_logits=True)
        logits = classifier(found)
    torch.testing.assert_close(classifier(found), logits)


def test_a_head_on_the_feature_map_is_pooled():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x, channels_last=False), x.mean((2, 3)))
    torch.testing.assert_close(pooled(x, channels_last=True), x.mean((1, 2)))
    torch.testing.assert_close(pooled(x[0], channels_last=False), x[0].mean(1))  # tokens

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.label_head = nn.Flatten()

    model = Model()
    features = PooledFeatures(model)
    model.label_head(x)
    torch.testing.assert_close(features.take(), x.mean((1, 2)))


def test_the_wider_features_are_mapped_by_a_fixed_matrix_with_orthonormal_rows():
    matrix = orthonormal_rows(8, 40, 7)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)
    assert torch.equal(matrix, orthonormal_rows(8, 40, 7)) and not torch.equal(matrix, orthonormal_rows(8, 40, 8))
    narrow, wide = small("convnext_atto"), small("swinv2_tiny_window8_256")
    image = torch.randn(2, 3, 32, 32)
    raw = []
    for student, teacher in ((narrow, wide), (wide, narrow)):
        hooks = PooledFeatures(student), PooledFeatures(teacher)
        pair = FeaturePair(student, teacher, 7)
        student(image), teacher(image)
        s, t = pair.take()
        raw = [hook.take() for hook in hooks]
        matrix = orthonormal_rows(16, 32, 7)
        expected = [x if x.shape[1] == 16 else x @ matrix.T for x in raw]
        torch.testing.assert_close([s, t], expected)
    assert s.requires_grad


def test_the_map_keeps_angles_about_as_they_are():
    x, y = torch.randn(2, 200, 768, generator=torch.Generator().manual_seed(0))
    y = x + y  # an angle of 45 degrees
    matrix = orthonormal_rows(192, 768, 0)
    before, after = (torch.cosine_similarity(a, b) for a, b in ((x, y), (x @ matrix.T, y @ matrix.T)))
    assert (before - after).abs().mean() < 0.05 and (before - after).abs().max() < 0.2
