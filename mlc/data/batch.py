"""From what the settings say to what a training step sees: the workers' transform, then cutout, erasing and mixing on
the device, a whole batch at a time.
"""

from collections.abc import Sequence

import torch

from mlc.config import Config
from mlc.data.augment import build_aa
from mlc.data.dataset import Batch
from mlc.data.mixing import Mix, draw_mix, together
from mlc.data.transforms import TrainTransform, cut_out, erase, normalize, parse_crop
from shards.console import UserError


def train_transform(config: Config, mean: Sequence[float]) -> TrainTransform:
    if config.aa:
        build_aa(config.aa, config.img_size, tuple(mean))  # a policy that timm does not know is refused here
    for crop in (config.crop, config.val_crop):
        parse_crop(crop)
    if config.val_crop == "rrc":
        raise UserError("--val-crop rrc is random; use squish, center, pad or if-needed:2")
    names = ("scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "crop")
    return TrainTransform(size=config.img_size, mean=tuple(mean), **{name: getattr(config, name) for name in names})


def random_batch(
    size: int, side: int, classes: int, device: torch.device, *, soft: int = 0, images: bool = True
) -> Batch:
    """What `prepare` and the objective need of a batch, with the soft labels of so many files."""
    more = {"soft": torch.rand(size, soft, classes, device=device)} if soft else {}
    if images:
        more["image"] = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=device)
    return more | {
        "target": torch.rand(size, classes, device=device),
        "position": torch.arange(size),
    }


def prepare(
    batch: Batch, config: Config, mean: Sequence[float], std: Sequence[float], *, mixing: bool
) -> tuple[torch.Tensor | None, torch.Tensor, Mix | None]:
    """Normalised, erased and mixed on the device: image float32 [B, 3, H, W] (None where no image is looked at), target
    [B, C], how it was mixed. Captions and features are left to be mixed later."""
    target, image = batch["target"], None
    if "image" in batch:
        image = normalize(batch["image"], mean, std)
    if config.cutout and image is not None:
        image = cut_out(image, batch["position"], side=config.cutout, seed=config.seed)
    if config.reprob and image is not None:
        image = erase(image, batch["position"], prob=config.reprob, mode=config.remode, seed=config.seed)
    if not mixing or together(config) == 1:
        return image, target, None
    size = (config.img_size,) * 2 if image is None else image.shape[2:]
    mix = draw_mix(batch["position"], config, *size)
    return None if image is None else mix.image(image), mix.labels(target), mix
