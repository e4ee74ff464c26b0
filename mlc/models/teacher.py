"""The teachers of a distillation: trained models, or the run's own average, that see the student's own images, mixed
and erased as they are.

A trained teacher stays whole on every process, whatever divides the student: it has no gradients and no optimizer
state. The run's own average is a module of the run and divided like the student.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlc.data.text import Tokenizer, load_tokenizer, numbering
from mlc.models.build import on_device
from mlc.models.export import load_exported
from mlc.models.feature_head import FeatureHead
from mlc.models.fusion import Fused
from shards.console import UserError

EMA = "ema"  # the name of the run's own average among the teachers


class Teacher:
    """image float [B, 3, H, W] normalised for the student (or features), and what it is told of the captions -> logits
    [B, C], without a gradient."""

    def __init__(self, model: nn.Module):
        """`model`: in eval mode, built for the student's images."""
        self.model, self._reads = model, isinstance(model, Fused | FeatureHead)
        self._size: int | None = None
        self._scale = self._shift = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        classes: Sequence[str],
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        tokenizer: Tokenizer | None = None,
        images: bool = True,
    ) -> "Teacher":
        """Of a run or an exported model. It may have been trained at another size and with another normalisation; its
        classes must be the student's, and the words of one with captions too.

        tokenizer: the student's; images: whether it looks at any.
        """
        folder = Path(folder)
        exported = folder / "best" if (folder / "best").is_dir() else folder
        model, info = load_exported(exported)
        _refuse_other_input(folder, exported, model, tokenizer, images)
        if info["label_names"] != list(classes):
            raise UserError(
                f"--kd-teacher {folder} knows other classes than the data set; train it on the same classes"
            )
        teacher, own = cls(on_device(model, device).requires_grad_(False)), info["pretrained_cfg"]
        teacher._size = own["input_size"][-1]
        own_mean, own_std, mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (own["mean"], own["std"], mean, std)
        )
        teacher._scale, teacher._shift = std / own_std, (mean - own_mean) / own_std
        return teacher

    @torch.no_grad()
    def __call__(self, image: Tensor | None, *captions: Any) -> Tensor:
        if self._scale is not None and image is not None:
            image = image * self._scale + self._shift
        if self._size and image is not None and image.shape[-1] != self._size:
            image = F.interpolate(image, size=self._size, mode="bicubic", align_corners=False)
        return self.model(image, *captions) if self._reads else self.model(image)


def _refuse_other_input(
    name: Path, exported: Path, model: nn.Module, tokenizer: Tokenizer | None, images: bool
) -> None:
    reads = isinstance(model, Fused)
    if not images and not (reads and model.image is None):
        raise UserError(f"--kd-teacher {name} looks at images, and this run reads captions alone; give it a --fusion")
    if reads and (tokenizer is None or numbering(load_tokenizer(exported / "text")) != numbering(tokenizer)):
        raise UserError(
            f"--kd-teacher {name} reads captions by a tokenizer of its own; train with the same --text-model, or "
            "start from --load-text of that run"
        )


def open_teachers(names: Sequence[str], *, averaged: nn.Module | None, **student) -> list[Teacher]:
    """Those of `--kd-teacher` that look at images: folders, and `ema`, the module `averaged`.

    student: `classes`, `device`, `mean`, `std`, `tokenizer` and `images`, as `Teacher.load` takes them.
    """
    return [Teacher(averaged) if name == EMA else Teacher.load(name, **student) for name in names]
