"""A model of images and captions that begins with what two runs have learned, or one run of both."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mlc.models.build import load_weights
from mlc.models.convert import read_weights
from mlc.models.fusion import Fused
from shards.console import UserError, listed, say

_PARTS = {"image": "--load", "text": "--load-text"}


def load_parts(
    model: Fused,
    image_run: str | Path | None = None,
    text_run: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Weights of `image.*` and of `text.*`, in place, from folders of runs or of exported weights.

    image_run: of an image model, or of one with captions, whose image part is taken. Other sizes of image are
        resampled, and a classifier that does not fit is left out with a line that says so (`load_weights`).
    text_run: of a text model or one with images. Its tokenizer must be the tokenizer of `model`.
    classes: in the order of the logits; runs must know the same ones where logits are fused.
    UserError for a folder that has no such part, and for a part that does not fit.
    """
    for part, run in (("image", image_run), ("text", text_run)):
        if run and getattr(model, part) is None:
            raise UserError(f"{_PARTS[part]} {run}: this model has no image part; leave it out or choose a --fusion")
    if image_run:
        folder = _weights_folder(image_run, "--load")
        _refuse_other_classes(model, "image", folder, classes)
        load_weights(model.image, folder, part="image." if _has(read_weights(folder), "image.") else "")
    if text_run:
        folder = _weights_folder(text_run, "--load-text")
        _refuse_other_classes(model, "text", folder, classes)
        _load_text(model, folder)


def load_combined(model: Fused, run: str | Path, *, classes: Sequence[str] | None = None) -> None:
    """All weights of a run of images and captions, in place; where its fusion is another, the parts alone."""
    folder = _weights_folder(run, "--load-combine")
    state = read_weights(folder)
    if not all(_has(state, f"{part}.") for part in ("image", "text")):
        raise UserError(f"--load-combine {run}: not of images and captions; give --load and --load-text their runs")
    load_parts(model, folder, folder, classes=classes)
    if model.fusion is None:
        return
    own, found = model.fusion.state_dict(), _part(state, "fusion.")
    if _shapes(own) == _shapes(found):
        model.fusion.load_state_dict(found)
    else:
        say(f"--load-combine {run}: its fusion is another; a new one is trained on its parts")


def _load_text(model: Fused, folder: Path) -> None:
    state = _part(read_weights(folder), "text.")
    if not state:
        raise UserError(f"--load-text {folder}: no text model in it; give a run with captions")
    own = model.text.state_dict()
    note = _drop_other_classifier(state, own)
    if model.text.no_caption is None:
        state.pop("no_caption", None)
    may_miss = ("classifier.", "no_caption")
    problems = [
        f"text.{name} is not in the file" for name in own.keys() - state.keys() if not name.startswith(may_miss)
    ]
    problems += [f"text.{name} is not in the model" for name in state.keys() - own.keys()]
    problems += [
        f"text.{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise UserError(
            f"--load-text {folder} does not fit --text-model ({len(problems)} weights):\n{listed(sorted(problems), 10)}"
        )
    model.text.load_state_dict(state, strict=False)
    if note:
        say(f"--load-text {folder}: {note}")


def _drop_other_classifier(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    known, wanted = (_shapes(_part(weights, "classifier.")) for weights in (state, own))
    if known == wanted:
        return ""
    for name in known:
        del state[f"classifier.{name}"]
    if not wanted:
        return "its classifier is left out: this fusion has its own"
    return "it has no classifier of this number of classes: a new one is trained"


def _weights_folder(run: str | Path, flag: str) -> Path:
    folder = Path(run)
    if not folder.exists():
        raise UserError(f"{flag} {run}: no such folder")
    return folder / "best" if (folder / "best").is_dir() else folder


def _refuse_other_classes(model: Fused, part: str, folder: Path, classes: Sequence[str] | None) -> None:
    """Logits of another order of classes would be fused in silence."""
    path, reads = folder / "config.json", model.fusion.reads if model.fusion else "logits"
    if classes is None or reads != "logits" or not path.is_file():
        return
    try:
        names = json.loads(path.read_text()).get("label_names")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from error
    if names and len(names) == len(classes) and list(names) != list(classes):
        raise UserError(f"{_PARTS[part]} {folder} knows other classes, or in another order; train it on the same data")


def _has(state: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
