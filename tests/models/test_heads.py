import numpy as np
import pytest
import torch
from torch import nn

from mlc.models.build import build_model, load_weights
from mlc.models.heads import fold, init_head_bias, unfold
from shards.console import UserError

TINY = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


def swin(head: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name="swinv2_tiny_window8_256", num_classes=3, img_size=32, head=head, model_kwargs=TINY)


def test_extra_linear_keeps_the_thousand_logits():
    model = swin("extra_linear")
    kept, added = model.get_classifier()
    assert (kept.out_features, added.in_features, added.out_features) == (1000, 1000, 3)
    assert model.num_classes == 3
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        thousand = kept(model.eval().forward_head(model.forward_features(image), pre_logits=True))
        torch.testing.assert_close(model(image), added(thousand))


def test_extra_linear_keeps_pretrained_classifier_weights(tmp_path):
    source = build_model(name="test_resnet", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_model(name="test_resnet", num_classes=3, head="extra_linear", pretrained_path=tmp_path / "w.pth")
    torch.testing.assert_close(model.get_classifier()[0].weight, source.get_classifier().weight)


def test_the_linear_suffix_of_a_name_is_the_head():
    assert len(build_model(name="test_resnet_linear", num_classes=3).get_classifier()) == 2


def test_a_classifier_that_is_not_one_linear_is_refused():
    with pytest.raises(UserError, match="use --head linear"):
        build_model(name="dla34", num_classes=3, head="extra_linear")


@pytest.mark.parametrize("name", ["fc", "head.fc"])
def test_folding_is_the_same_function(name):
    torch.manual_seed(0)
    two, one = nn.Sequential(nn.Linear(8, 50), nn.Linear(50, 3)), nn.Linear(8, 3)
    state = {f"{name}.{key}": value for key, value in two.state_dict().items()} | {"norm.weight": torch.ones(8)}
    folded = fold(state, name)
    assert folded.keys() == {f"{name}.weight", f"{name}.bias", "norm.weight"}
    one.load_state_dict({key: folded[f"{name}.{key}"] for key in ("weight", "bias")})
    x = torch.randn(5, 8)
    torch.testing.assert_close(one(x), two(x))


def test_a_folded_classifier_is_loaded_into_two_layers(tmp_path, capsys):
    """What a run with this head exports is what another run with it starts from."""
    torch.manual_seed(0)
    source, model, image = swin("extra_linear").eval(), swin("extra_linear").eval(), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(source.get_classifier()[1].bias)
    torch.save(fold(source.state_dict(), "head.fc"), tmp_path / "w.pth")
    assert load_weights(model, tmp_path / "w.pth") and capsys.readouterr().err == ""
    with torch.no_grad():
        torch.testing.assert_close(model(image), source(image), rtol=1e-4, atol=1e-5)
    assert [tuple(layer.weight.shape) for layer in model.get_classifier()] == [(1000, 32), (3, 1000)]
    state = {"head.fc.weight": torch.ones(4, 32), "head.fc.bias": torch.ones(4)}
    assert unfold(state, model) is state and unfold(state, swin("linear")) is state


def test_folding_leaves_other_states_alone():
    state = {"head.fc.weight": torch.ones(3, 8), "head.fc.bias": torch.ones(3)}
    assert fold(state, "head.fc") is state and fold(state, None) is state and fold(state, ("a", "b")) is state


@pytest.mark.parametrize("head", ["linear", "extra_linear"])
def test_the_untrained_model_predicts_the_prior(head):
    model = swin(head)
    prior = np.array([0.75, 0.01, 0.0])
    init_head_bias(model, prior)
    probability = model.eval()(torch.randn(4, 3, 32, 32)).sigmoid()
    torch.testing.assert_close(probability, torch.tensor([[0.75, 0.01, 1e-4]]).expand(4, 3))


def test_the_prior_start_can_be_trained():
    model = swin("extra_linear")
    init_head_bias(model, torch.tensor([0.2, 0.1, 0.5]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.patch_embed.proj.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, model.patch_embed.proj.weight)


def test_a_classifier_without_bias_is_refused():
    model = swin("linear")
    model.head.fc.bias = None
    with pytest.raises(UserError, match="--head-bias zero"):
        init_head_bias(model, torch.full((3,), 0.5))
