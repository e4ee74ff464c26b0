import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mlc.optim.param_groups import param_groups
from shards.console import UserError

TINY = {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 3}


def swin_v2():
    return timm.create_model("swinv2_tiny_window8_256", **TINY)


def names(model, decay: float) -> list[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(p)] for g in param_groups(model, 0.05) if g["weight_decay"] == decay for p in g["params"]]


def test_swin_v2_decays_matrices_only():
    model = swin_v2()
    expected = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "cpb_mlp" not in name and "logit_scale" not in name
    ]
    assert names(model, 0.05) == expected
    assert len(names(model, 0.0)) + len(expected) == len(list(model.parameters()))


def test_swin_v2_equals_timm_with_the_models_own_list():
    model = swin_v2()
    reference = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    mine = param_groups(model, 0.05)
    assert [[id(p) for p in g["params"]] for g in mine] == [[id(p) for p in g["params"]] for g in reference]


def test_position_parameters_of_other_backbones_take_no_decay():
    swin = timm.create_model("swin_tiny_patch4_window7_224", **TINY)
    tables = [name for name, _ in swin.named_parameters() if "relative_position_bias_table" in name]
    assert tables and set(tables) <= set(names(swin, 0.0))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    assert {"pos_embed", "cls_token"} <= set(names(vit, 0.0))


def test_a_position_table_the_backbone_does_not_list():
    model = torch.nn.Module()
    model.absolute_pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 2))
    model.head = torch.nn.Linear(2, 2)
    assert names(model, 0.0) == ["absolute_pos_embed", "head.bias"] and names(model, 0.05) == ["head.weight"]


def test_frozen_parameters_are_left_out():
    model = swin_v2()
    model.patch_embed.requires_grad_(False)
    listed = names(model, 0.0) + names(model, 0.05)
    assert listed and not any(name.startswith("patch_embed") for name in listed)


def test_the_groups_survive_a_distributed_checkpoint():
    model = swin_v2()
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    restored = torch.optim.AdamW(param_groups(model, 0.05), lr=0.3)
    set_optimizer_state_dict(model, restored, get_optimizer_state_dict(model, optimizer))
    assert [g["weight_decay"] for g in restored.param_groups] == [0.0, 0.05]
    assert restored.param_groups[0]["lr"] == 0.1
    weight = model.head.fc.weight
    assert torch.equal(restored.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def scales(model, **more) -> dict[str, float]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(p)]: g["lr_scale"] for g in param_groups(model, 0.05, **more) for p in g["params"]}


@pytest.mark.parametrize(
    "name, kwargs, layers",
    [
        ("swinv2_tiny_window8_256", TINY, {"layers.0.blocks.0": 5, "layers.1.blocks.0": 3, "layers.1.blocks.1": 2}),
        ("swin_tiny_patch4_window7_224", TINY, {"layers.0.blocks.0": 5, "layers.1.blocks.1": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "num_classes": 3}, {"blocks.0": 4, "blocks.2": 2}),
        ("resnet18", {"num_classes": 3}, {"layer1.0": None, "layer4.1": None}),
    ],
)
def test_layer_decay_equals_timms(name, kwargs, layers):
    model = timm.create_model(name, **kwargs)
    mine = scales(model, layer_decay=0.7)
    theirs = param_groups_layer_decay(model, 0.05, layer_decay=0.7)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    assert mine == {by_id[id(p)]: g["lr_scale"] for g in theirs for p in g["params"]}
    head = next(value for key, value in mine.items() if key.startswith(model.pretrained_cfg["classifier"]))
    assert head == 1 and max(mine.values()) == 1 and min(mine.values()) < 0.7
    blocks = [next(value for key, value in mine.items() if key.startswith(block)) for block in layers]
    assert blocks == sorted(blocks) and len(set(blocks)) == len(blocks)  # later layers learn faster


def test_multipliers_by_expression():
    model = swin_v2()
    mine = scales(model, lr_mult={r"^layers\.0": 0.1, "layers": 0.5}, wd_mult={"mlp": 0.5})
    for name, scale in mine.items():
        assert scale == (0.1 if name.startswith("layers.0") else 0.5 if "layers" in name else 1.0)
    decays = {g["weight_decay"] for g in param_groups(model, 0.05, wd_mult={"mlp": 0.5})}
    assert decays == {0.0, 0.025, 0.05}
    both = scales(model, layer_decay=0.5, lr_mult={"head": 10})
    assert (
        both["head.fc.weight"] == 10
        and both["patch_embed.proj.weight"] == scales(model, layer_decay=0.5)["patch_embed.proj.weight"]
    )


@pytest.mark.parametrize("given, words", [({"heda": 2}, "found in no parameter"), ({"(": 2}, "no regular expression")])
def test_an_expression_that_finds_nothing(given, words):
    with pytest.raises(UserError, match=words):
        param_groups(swin_v2(), 0.05, lr_mult=given)
