"""Linear probing, then fine-tuning: the classifier of a network starts as the head that was trained on its frozen
features (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). A new
classifier's first gradients are noise that the pretrained weights would pay for; this one's are small.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mlc.models.encoders import digest
from mlc.models.export import load_exported
from mlc.models.feature_head import FeatureHead
from mlc.models.heads import classifier_prefixes, last_layers
from shards.console import UserError, did_you_mean


@torch.no_grad()
def init_head(model: nn.Module, run: str | Path, classes: Sequence[str]) -> None:
    """Puts the linear head of a run on frozen features into the model's classifier, normalisation and all.

    W (x - mean) / std + b is one Linear of x: W / std, b - (W / std) mean.

    Raises:
        UserError: the run has no linear head on features of this very backbone, or none for these classes.
    """
    folder = Path(run) / "best" if (Path(run) / "best").is_dir() else Path(run)
    head, info = load_exported(folder)
    encoders = info.get("mlc", {}).get("features")
    if not isinstance(head, FeatureHead) or not encoders:
        raise UserError(f"--init-head {run}: not a run of `mlc train --features`")
    if not hasattr(head, "classifier") or head.norm == "l2" or len(encoders) != 1:
        what = f"{len(encoders)} encoders" if len(encoders) != 1 else f"--head {head.head_spec['head']}, {head.norm}"
        raise UserError(f"--init-head {run}: expected a linear head on one image encoder, without l2; it has {what}")
    if encoders[0]["weights"] != _digest(model):
        raise UserError(
            f"--init-head {run}: its features are of {encoders[0]['name']} with other weights than this model starts "
            "from; make them with the same --model and --pretrained-path"
        )
    names = list(info.get("label_names") or ())
    for name in classes:
        if name not in names:
            raise UserError(f"--init-head {run}: it knows no class {name!r}{did_you_mean(name, names)}")
    rows = torch.tensor([names.index(name) for name in classes])
    weight, bias = head.classifier.weight.double(), head.classifier.bias.double()
    if head.norm == "standardize":
        weight = weight / head.std.double()
        bias = bias - weight @ head.mean.double()
    for own_weight, own_bias in last_layers(model):
        own_weight.copy_(weight[rows].reshape(own_weight.shape))
        own_bias.copy_(bias[rows])


def _digest(model: nn.Module) -> str:
    """What `mlc features` says of a backbone, for one that has a classifier."""
    heads = classifier_prefixes(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    return digest({f"model.{name}": tensor for name, tensor in state.items()})
