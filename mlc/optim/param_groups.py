"""Which parameters learn how fast and are pulled towards zero how strongly.

Weight decay is a prior for matrices; for a norm's scale, a bias, a position table or an attention temperature it is
only a pull towards a worse model, so these get none. A layer near the input has learned what is useful for any picture
and should move less than the classifier, which starts from nothing: hence a learning rate that decays from layer to
layer.
"""

import re
from collections.abc import Mapping, Sequence

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from shards.console import UserError, did_you_mean

# Tables and small networks that encode a position, and SwinV2's attention temperature: two-dimensional or more, so the
# one-dimensional rule misses them, and a backbone's own list names only some of them.
NO_DECAY = ("*relative_position_bias_table*", "*pos_embed*", "*cpb_mlp*", "*logit_scale*")


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    lr_mult: Mapping[str, float] | None = None,
    wd_mult: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """`[{"params", "weight_decay", "lr_scale"}, ...]`; the learning rate of a group is the run's times its `lr_scale`.

    Only parameters that require a gradient, in the order of `model.named_parameters()`, so the same model always gives
    the same groups. Undecayed: one-dimensional parameters and biases, the names in NO_DECAY, and what the backbone's
    own `no_weight_decay()` lists (timm). Give it the bare model: a wrapper hides that list.

    layer_decay: d of layer-wise learning-rate decay, `lr_scale = d ^ (layers after it)`; which layer a parameter is of
        is timm's `group_matcher` (Clark et al. 2020, "ELECTRA"; Bao et al. 2021, "BEiT").
    lr_mult, wd_mult: {regular expression: factor}; the first that is found in a parameter's name counts.
    scales: {name: one more factor of its learning rate}.
    UserError for an expression that finds nothing.
    """
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    excluded = [*sorted(listed), *NO_DECAY]
    if layer_decay:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay)
    else:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _refuse_idle({"--lr-mult": lr_mult or {}, "--wd-mult": wd_mult or {}}, list(names.values()))
    found: dict[tuple, dict] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            name = names[id(parameter)]
            scale = group.get("lr_scale", 1.0) * _factor(name, lr_mult or {}) * (scales or {}).get(name, 1.0)
            decay = group["weight_decay"] * _factor(name, wd_mult or {})
            own = found.setdefault((number, scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
            own["params"].append(parameter)
    return list(found.values())


def _factor(name: str, factors: Mapping[str, float]) -> float:
    return next((factor for expression, factor in factors.items() if re.search(expression, name)), 1.0)


def _refuse_idle(given: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    for flag, factors in given.items():
        for expression in factors:
            try:
                found = any(re.search(expression, name) for name in names)
            except re.error as error:
                raise UserError(f"{flag} {expression}: no regular expression: {error}") from error
            if not found:
                near = did_you_mean(expression, list(names))
                raise UserError(f"{flag} {expression}: found in no parameter's name{near}; one is {names[-1]}")
