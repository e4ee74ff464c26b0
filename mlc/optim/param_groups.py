"""Weight decay pulls a weight towards zero. That is a prior for matrices; for a norm's scale, a bias, a position table
or an attention temperature it is only a pull towards a worse model, so these get none.
"""

from timm.optim import param_groups_weight_decay
from torch import nn

# Tables and small networks that encode a position, and SwinV2's attention temperature: two-dimensional or more, so the
# one-dimensional rule misses them, and a backbone's own list names only some of them.
NO_DECAY = ("*relative_position_bias_table*", "*pos_embed*", "*cpb_mlp*", "*logit_scale*")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """`[{"params", "weight_decay": 0.0}, {"params", "weight_decay": weight_decay}]` for AdamW, an empty group left out.

    Only parameters that require a gradient, in the order of `model.named_parameters()`, so the same model always gives
    the same groups. Undecayed: one-dimensional parameters and biases, the names in NO_DECAY, and what the backbone's
    own `no_weight_decay()` lists (timm). Give it the bare model: a wrapper hides that list.
    """
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=[*sorted(listed), *NO_DECAY])
