"""Logits of every row exactly once, on all processes: what evaluation and prediction have in common.

Rows go through the model in fixed blocks, block b on rank b mod W, padded at the end and masked. A row therefore always
meets the same neighbours, and the results do not depend on the number of processes. The device always has the next
block before the host looks at the results of one.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from mlc.data.dataset import BadSamples, Batch, EvalDataset
from mlc.data.loader import Waiting, eval_blocks, load
from mlc.data.reader import FolderReader, TarReader
from mlc.data.transforms import normalize
from mlc.parallel.launch import Fetched
from shards.console import UserError, plural, progress, say

View = Callable[[torch.Tensor], torch.Tensor]  # [B, 3, H, W] -> [B, 3, H, W]
ZOOM = 1.15  # the `scale` view shows the middle of the image this much larger


def hflip(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1)


def zoom(image: torch.Tensor) -> torch.Tensor:
    """The centre of the image at the model's own size."""
    height, width = image.shape[-2:]
    h, w = round(height / ZOOM), round(width / ZOOM)
    top, left = (height - h) // 2, (width - w) // 2
    center = image[..., top : top + h, left : left + w]
    return F.interpolate(center, size=(height, width), mode="bicubic", align_corners=False)


def tta_views(spec: str) -> list[View]:
    """`hflip,scale` -> the views of every combination of the named augmentations; '' -> the image alone.

    Raises:
        UserError: an unknown name.
    """
    known = {"hflip": hflip, "scale": zoom}
    names = [name.strip() for name in spec.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--tta {spec}: unknown view {name!r}; known: {', '.join(known)}")
    views: list[View] = [lambda image: image]
    for name in dict.fromkeys(names):
        views += [lambda image, before=before, then=known[name]: then(before(image)) for before in views]
    return views


@torch.no_grad()
def logits_of_rows(
    models: Sequence[torch.nn.Module],
    dataset: EvalDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    mean: Sequence[float],
    std: Sequence[float],
    bad: BadSamples,
    views: Sequence[View] = (lambda image: image,),
    title: str = "",
    answer: Callable[[torch.nn.Module, torch.Tensor | None, Batch], torch.Tensor] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (row int64 [M], logits float32 [M, models, views, C]) on every process: together all rows of
    `dataset`, each once.

    Rows whose image cannot be read do not come; `bad` counts them on all processes alike, and the first process names
    them. All models see all views of an image that is decoded once; of several captions their answers are averaged into
    one, and without images there is one view. Models are left in the mode they were in. `answer` is what to take from a
    model, image and batch in place of logits, float32 [B, any number].
    """
    ask = answer or answered
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    blocks = list(eval_blocks(dataset.rows, batch_size, world, rank))
    batches = Waiting(load(dataset, blocks, workers=workers, device=accelerator.device), accelerator.device)

    def usable(fetched: Fetched) -> tuple[np.ndarray, np.ndarray]:
        row, valid, logits = fetched.read()
        for text in bad.add(map(dataset.problem, row[(row >= 0) & (valid == 0)].tolist())):
            if accelerator.is_main_process:
                say(text)
        return row[valid > 0], logits[valid > 0]

    before: Fetched | None = None
    with progress(title, len(blocks), enabled=bool(title) and accelerator.is_main_process) as advance:
        for batch in batches:
            image = normalize(batch["image"], mean, std) if "image" in batch else None
            with accelerator.autocast():
                seen = [None] if image is None else [view(image) for view in views]
                each = [torch.stack([ask(model, view, batch) for view in seen], dim=1) for model in models]
            logits = torch.stack(each, dim=1)
            fetched = Fetched(*accelerator.gather((batch["row"], batch["valid"].int(), logits)))
            batches.prepare()
            if before:  # whose results have come while the device computes these
                yield usable(before)
                advance()
            before = fetched
        if before:
            yield usable(before)
            advance()
    for module, mode in modes:
        module.training = mode


def answered(model: torch.nn.Module, image: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Logits float32 [B, C] of an image, with captions those of the average of the probabilities with each of them."""
    if "tokens" not in batch:
        return model(batch.get("features", image)).float()
    each = model(image, batch["tokens"], batch["token_mask"]).float()  # [B, K, C]
    if each.shape[1] == 1:
        return each[:, 0]
    share = batch["caption_weight"].log()[:, :, None]  # -inf where there is none
    yes, no = (torch.logsumexp(share + F.logsigmoid(sign * each), 1) for sign in (1, -1))
    return yes - no


def non_finite(values: np.ndarray, rows: np.ndarray, reader: TarReader | FolderReader, classes: Sequence[str]) -> str:
    """Names the first of the outputs [N, C] for `rows` that is no number or infinite; "" where all
    are finite."""
    wrong = ~np.isfinite(values)
    if not wrong.any():
        return ""
    place, column = (int(number) for number in np.argwhere(wrong)[0])
    images = plural(int(wrong.any(1).sum()), "image")
    return (
        f"{reader.name(int(rows[place]))}, class {classes[column]}: the model's output is "
        f"{values[place, column]:g} ({images} of {len(rows)})"
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid of [..., C] in float64, averaged over the views of [M, views, C]; float32 [M, C]."""
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).mean(axis=1).astype(np.float32)
