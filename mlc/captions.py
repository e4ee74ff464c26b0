"""What a run needs to read captions, from its settings: the tokenizer, the text's part of the model, and what a model
of captions is called with.

A tokenizer and the encoder's description lie in the run from its first step on (`RUN/text`), so that a resumed run
needs neither the folder of the pretrained model nor the same captions to number words as before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlc.config import Config
from mlc.data.captions import EvalCaptions, TrainCaptions, cleaned, join, mixed_sources
from mlc.data.dataset import Batch, TrainDataset
from mlc.data.mixing import Mix, together
from mlc.data.reader import FolderReader, TarReader
from mlc.data.sources import Sources
from mlc.data.text import Tokenizer, Words, load_tokenizer, numbering, pretrained_tokenizer
from mlc.embed import read_embeddings
from mlc.models.freeze import learning_norms
from mlc.models.fusion import Fused
from mlc.models.fusion_parts import load_combined, load_parts
from mlc.models.text import build_text_model, shares_layers, text_folder
from mlc.models.text_export import export_text, load_text
from mlc.parallel.memory import to_device
from mlc.parallel.storage import Place
from shards.captions import switches
from shards.console import UserError
from shards.dataset import Index

MOST = 8  # captions of a sample that are averaged in an evaluation


class Reading:
    """How a run reads captions."""

    def __init__(self, config: Config, sources: Sources, folder: Path | None):
        """`folder`: `text/` of the run that goes on, None for a new one. Every process makes the same.

        Raises:
            UserError: no such tokenizer, switch of --clean, or no word in the captions.
        """
        self.folder, self.clean, self._parts = folder, switches(config.clean), sources.sampler.sources
        self.tokenizer = self._tokenizer(config, sources)

    def _tokenizer(self, config: Config, sources: Sources) -> Tokenizer:
        folder, most = self.folder, config.max_tokens
        if folder is None and (run := config.load_text or config.load_combine):
            folder = _exported_text(Path(run), "--load-text" if config.load_text else "--load-combine")
        if folder:
            return load_tokenizer(folder, most)
        if config.text_model == "bigru":
            texts = (text for rows in self._parts for text in cleaned(rows.index, self.clean, rows.rows))
            return Words.of(texts, max_tokens=most)
        named = Path(config.text_model).expanduser()
        return pretrained_tokenizer(str(text_folder(named)) if named.is_dir() else config.text_model, most)

    @property
    def empty(self) -> list[int]:
        """Tokens of an empty caption."""
        return self.tokenizer([""])[0][0].tolist()

    def facts(self) -> dict[str, str]:
        """For the checkpoint; see `compare`."""
        return {"words": numbering(self.tokenizer)}

    def compare(self, meta: dict[str, Any], path: Place) -> None:
        """Raises UserError where the words of a checkpoint had other numbers."""
        if meta.get("words", numbering(self.tokenizer)) != numbering(self.tokenizer):
            raise UserError(
                f"{path} numbers words in another way than the tokenizer that there is now; copy text/ of that run "
                "into this one"
            )

    def described(self, config: Config) -> dict[str, Any]:
        """For the `config.json` of exported weights."""
        return {"clean": list(self.clean), "max_tokens": config.max_tokens}

    def save(self, model: Fused, run: Path) -> None:
        """Into a new run, for the day it is resumed."""
        if self.folder != run / "text":
            export_text(model.text.encoder, run, tokenizer=self.tokenizer, weights=False)

    # ---- Data --------------------------------------------------------------------------------------------------------

    def training(self, config: Config, sources: Sources) -> TrainCaptions:
        indexes = [rows.index for rows in sources.sampler.sources]
        dropout = {"word_dropout": config.word_dropout, "caption_dropout": config.caption_dropout}
        return TrainCaptions(indexes, self.tokenizer, config.seed, clean=self.clean, **dropout)

    def evaluation(self, index: Index) -> EvalCaptions:
        return EvalCaptions(index, self.tokenizer, clean=self.clean, most=MOST)

    def random(self, size: int, device: torch.device) -> Batch:
        """The longest captions that there may be, for a trial of the memory."""
        shape = (size, self.tokenizer.max_tokens)
        tokens = torch.randint(len(self.tokenizer), shape, device=device)
        return {"tokens": tokens, "token_mask": torch.ones(shape, dtype=torch.bool, device=device)}

    # ---- Model -------------------------------------------------------------------------------------------------------

    def model(self, image: nn.Module | None, config: Config, *, num_classes: int, published: bool) -> Fused:
        """published: begin from the published weights of the text model and from --embeddings."""
        encoder = self._encoder(config, published=published and not (config.load_text or config.load_combine))
        most = getattr(encoder, "max_tokens", None)
        if most and self.tokenizer.max_tokens > most:
            raise UserError(f"--max-tokens {self.tokenizer.max_tokens}: {config.text_model} reads {most}")
        return Fused(
            image,
            encoder,
            fusion=config.fusion,
            num_classes=num_classes,
            empty=self.empty,
            fusion_kwargs=config.fusion_kwargs,
        )

    def _encoder(self, config: Config, *, published: bool) -> nn.Module:
        if self.folder:
            return load_text(self.folder.parent, weights=False).train()
        vectors = None
        if config.embeddings:
            made = {"parts": self._parts, "clean": self.clean, "dim": config.text_kwargs.get("dim") or 150}
            vectors, _ = read_embeddings(config.embeddings, self.tokenizer, **made)
        return build_text_model(
            config.text_model,
            pretrained=published,
            pool=config.text_pool,
            kwargs=config.text_kwargs,
            vocabulary=len(self.tokenizer),
            embeddings=vectors,
        )


def by_length(stream: TrainDataset, config: Config) -> Callable[[range], list[int]] | None:
    """What `--group-by-length` makes of the positions of a global batch, for `train_positions`."""
    if not config.group_by_length:
        return None
    return partial(stream.captions.arranged, sampler=stream.sampler, together=together(config))


def open_reading(config: Config, sources: Sources, checkpoint: Place | None, run: Path) -> Reading | None:
    """How the run reads captions, None where it does not; `checkpoint`: what it goes on from."""
    if not config.text_model:
        return None
    folders = [folder for folder in (_beside(checkpoint), run / "text") if folder and folder.is_dir()]
    return Reading(config, sources, folders[0] if checkpoint and folders else None)


def refuse_untrainable(model: Fused, config: Config, *, recomputed: Sequence[nn.Module], zero_stage: int) -> None:
    """Raises UserError for settings that this model cannot be trained with; recomputed: what `recompute` gave."""
    norms = learning_norms(model) if config.group_by_length else []
    if norms:
        raise UserError(
            f"--group-by-length: batch norm ({norms[0]}) would see captions of one length at a time; leave the flag "
            "out, or batch norm: --fusion-kwargs norm=false, --text-kwargs norm=false, --freeze"
        )
    encoder = model.text.encoder
    if zero_stage == 3 and shares_layers(encoder) and any(part in recomputed for part in encoder.modules()):
        raise UserError(
            f"--grad-checkpointing: layers of {config.text_model} share their weights, whose gradients DeepSpeed then "
            "counts more than once under ZeRO-3; leave it out, or take --strategy ddp"
        )


def load_text_parts(model: nn.Module, config: Config, classes: Sequence[str]) -> None:
    """--load, --load-text, --load-combine, into a model of captions in place."""
    if config.load_combine:
        load_combined(model, config.load_combine, classes=classes)
    elif config.load or config.load_text:
        load_parts(model, config.load or None, config.load_text or None, classes=classes)


def text_only(config: Config) -> bool:
    """Whether captions are all that is looked at."""
    return bool(config.text_model) and config.fusion == "none"


def decodes_images(config: Config) -> bool:
    return not text_only(config) and not config.features


def _exported_text(run: Path, flag: str) -> Path:
    folder = (run / "best" if (run / "best").is_dir() else run) / "text"
    if not folder.is_dir():
        raise UserError(f"{flag} {run}: no text/ in it; give a run with captions")
    return folder


def _beside(checkpoint: Place | None) -> Path | None:
    """`text/` of the run that a checkpoint on a disk is of: RUN/checkpoints/step-..."""
    return checkpoint.parent.parent / "text" if isinstance(checkpoint, Path) else None


def text_of_run(checkpoint: Place, config: dict[str, Any]) -> Path:
    """`text/` of the run of a checkpoint with these settings. Raises UserError where it is not to be found."""
    name = config["experiment"] or f"{config['model']}-{config['img_size']}"
    folders = [_beside(checkpoint), Path(config["output"]) / name / "text"]
    for folder in folders:
        if folder and (folder / "config.json").is_file():
            return folder
    raise UserError(f"{checkpoint}: its model reads captions, and text/ of its run is not at {folders[-1]}")


# ---- what a model is called with -------------------------------------------------------------------------------------


def model_inputs(
    image: Tensor | None, batch: Batch, mix: Mix | None, config: Config, reading: Reading | None, most: int | None
) -> tuple:
    """Arguments of the model: the image, and with captions their tokens, mask, and how they are mixed; or features and
    how they are mixed.

    most: how many tokens the encoder has places for, None for any number.
    """
    if config.features:
        return batch["features"], mix and mix.shares(batch["features"].device)
    if reading is None:
        return (image,)
    tokens, mask = batch["tokens"], batch["token_mask"]
    if mix is None or config.mix_captions == "off":
        return image, tokens, mask, None
    if config.mix_captions == "embeddings":
        return image, tokens, mask, mix.shares(tokens.device)
    sources = to_device(mixed_sources(mix), tokens.device)
    most = most or tokens.shape[1] * sources.shape[1]
    told = {"pad": reading.tokenizer.pad, "starts": reading.tokenizer.starts, "most": most}
    return image, *join(tokens, mask, sources, **told), None


# ---- exported runs ---------------------------------------------------------------------------------------------------


def captions_of(folder: str | Path, info: dict, reader: TarReader | FolderReader) -> EvalCaptions | None:
    """The captions for an exported model with the `config.json` `info`; None where it reads none, or there are none.

    Raises:
        UserError: it reads nothing else, and `reader` has none.
    """
    own = info.get("mlc", {})
    if "fusion" not in own:
        return None
    if isinstance(reader, FolderReader):
        if own["fusion"] == "none":
            raise UserError("this run reads captions alone, and a folder of images has none; give it --data DIR")
        return None
    return EvalCaptions(reader.index, load_tokenizer(Path(folder) / "text"), clean=own.get("clean", ()), most=MOST)


def reading_of(folder: str | Path, info: dict) -> tuple | None:
    """How an exported model reads captions, equal for models that can read the same tokens; None where it does not."""
    own = info.get("mlc", {})
    if "fusion" not in own:
        return None
    tokenizer = load_tokenizer(Path(folder) / "text")
    return own.get("clean"), tokenizer.max_tokens, numbering(tokenizer)


def sees_images(info: dict) -> bool:
    own = info.get("mlc", {})
    return own.get("fusion") != "none" and "features" not in own


def model_name(config: Config) -> str:
    """For the log."""
    if config.features:
        return f"{config.head} head on {' + '.join(config.features)}"
    image = f"{config.model} at {config.img_size} px"
    if not config.text_model:
        return image
    text = f"captions by {config.text_model}"
    return text if text_only(config) else f"{image}, {text}, {config.fusion}"
