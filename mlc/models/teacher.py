"""The teacher of a distillation: a trained model that sees the student's own images, mixed and erased as they are."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from mlc.models.export import load_exported
from shards.console import UserError


class Teacher:
    """image float [B, 3, H, W] normalised for the student -> the teacher's logits [B, C], without a gradient.

    The teacher may have been trained at another size and with another normalisation; its classes must be the student's.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: Sequence[str],
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        folder = Path(folder)
        model, info = load_exported(folder / "best" if (folder / "best").is_dir() else folder)
        if info["label_names"] != list(classes):
            raise UserError(
                f"--kd-teacher {folder} knows other classes than the data set; train it on the same classes"
            )
        self._model = model.to(device).requires_grad_(False)
        own = info["pretrained_cfg"]
        self._size = own["input_size"][-1]
        own_mean, own_std, mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (own["mean"], own["std"], mean, std)
        )
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image * self._scale + self._shift
        if image.shape[-1] != self._size:
            image = F.interpolate(image, size=self._size, mode="bicubic", align_corners=False)
        return self._model(image)
