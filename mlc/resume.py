"""What a run starts from, and whether it may: `--resume`, `--resume-weights-only`, `--allow-data-change`.

A checkpoint says in `meta.json` what it was made with. A difference that changes neither what the weights mean nor
which sample comes next is said in one line; any other is refused with both values and the flag that allows it, because
a run that silently goes on with other data or another order cannot be told from a sound one afterwards.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlc.config import Config, flag
from mlc.flags import read_yaml
from mlc.parallel import storage
from mlc.parallel.storage import META, Place
from shards.captions import switches
from shards.console import UserError
from shards.urls import is_url

NETWORK = ("model", "head", "head_kwargs", "model_kwargs")  # other weights
NETWORK += ("text_model", "text_kwargs", "text_pool", "fusion", "fusion_kwargs", "feature_norm")
STREAM = ("seed", "img_size", "model_ema", "clean", "max_tokens")  # another run with the same weights
# What may differ without a word: where things lie, and how the run is started, watched and saved.
SILENT = (
    "data",
    "features",
    "workers",
    "cache_dir",
    "cache_gb",
    "log_samples",
    "pretrained",
    "pretrained_path",
    "embeddings",
    "load",
    "load_text",
    "load_combine",
    "grad_checkpointing",
    "attention",
    "memory_format",
    "global_batch_size",
    "checkpoint_every",
    "checkpoint_hist",
    "checkpoint_async",
    "checkpoint_dir",
    "resume",
    "resume_weights_only",
    "allow_data_change",
    "output",
    "experiment",
    "profile",
    "log_interval",
    "log_wandb",
    "wandb_project",
    "wandb_group",
    "wandb_tags",
    "wandb_mode",
    "wandb_samples",
    "wandb_artifacts",
    "dry_run",
    "log_tensorboard",
    "strategy",
    "collective_timeout",
)


@dataclass
class Start:
    """`checkpoint`: what to load, None for a new run; `notices`: lines for the log."""

    checkpoint: Place | None = None
    weights_only: bool = False
    notices: list[str] = field(default_factory=list)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What the checkpoint says about itself."""
        return storage.read_meta(self.checkpoint)

    def progress(self) -> dict[str, Any]:
        """The loop's few scalars, where the run goes on from."""
        new = {"step": 0, "samples_seen": 0, "best": None, "best_step": None, "stale": 0, "bad": {}}
        if not self.checkpoint or self.weights_only:
            return new
        for name, value in new.items():
            self.meta["progress"].setdefault(name, value)
        return self.meta["progress"]

    def only_weights(self, stage: int) -> bool:
        """Whether weights and their average are all that is taken: by the user's wish, or at the begin of a stage."""
        return self.weights_only or self.meta.get("stage", 0) != stage


def checkpoint_root(checkpoint_dir: str, run: Path) -> Place:
    """Where a run's checkpoints are. Raises UserError for a URL that cannot be used."""
    return storage.at(storage.place(checkpoint_dir), run.name) if checkpoint_dir else run / "checkpoints"


def find(config: Config, run: Path) -> Start:
    """The checkpoint that the flags name, unharmed; every rank gets the same.

    Raises:
        UserError: there is none at that path, or none that is sound.
    """
    return _same_on_all(lambda: _candidates(config, run), _first_sound)


def _candidates(config: Config, run: Path) -> tuple[list[Place], Start]:
    """(checkpoints that may be meant, the best first; what is known of the start)."""
    if not config.resume:
        return [], Start()
    own = storage.complete(checkpoint_root(config.checkpoint_dir, run))[::-1]
    if config.resume == "auto":
        return own, Start()
    named = at_path(config.resume, "--resume ")
    if not config.resume_weights_only:
        return named, Start()
    if own and named[0] in own:
        raise UserError(f"--resume-weights-only starts a new run: give another --experiment than {run.name}")
    if own:  # the run was begun in this way, was stopped, and is started again by the same command
        return own, Start(notices=["this run has checkpoints of its own and goes on from them, not from --resume"])
    return named, Start(weights_only=True)


def at_path(text: str, flag: str = "") -> list[Place]:
    """The complete checkpoints that a path or URL names, the best first: itself, or those of a run or a folder.

    Raises:
        UserError: nothing there.
    """
    path = storage.place(text)
    if META in storage.names(path):
        return [path]
    for root in roots(path):
        if found := storage.complete(root):
            return found[::-1]
    raise UserError(f"{flag}{text}: no complete checkpoint there; give a run, or a folder step-... with a {META}")


def roots(path: Place) -> list[Place]:
    """Where the checkpoints of a run may be: where its settings say, in it, or the path is their folder itself."""
    settings = path / "args.yaml" if isinstance(path, Path) else None
    set_to = read_yaml(settings).get("checkpoint_dir", "") if settings and settings.is_file() else ""
    inside = [storage.at(path, "checkpoints"), path]
    return [checkpoint_root(set_to, path), *inside] if set_to else inside


def _first_sound(candidates: Sequence[Place], start: Start, rank: int, world: int) -> Start:
    """Reads every file of the newest; where it is damaged, says so and takes the one before."""
    for place in candidates:
        # What lies behind a URL has checksums of its storage, and would be downloaded twice.
        reasons = _everyones(storage.damage(place, contents=not is_url(place), part=rank, parts=world))
        reason = next(filter(None, reasons), "")
        if not reason:
            start.checkpoint = place
            return start
        start.notices.append(f"{place} is damaged and left out: {reason}")
    if candidates:
        raise UserError("; ".join(start.notices) + "; there is no other checkpoint to go on from")
    return start


def _same_on_all(list_them: Callable[[], tuple], choose: Callable[..., Start]) -> Start:
    """Lists on the first process, whose view of a shared disk may be ahead of the others'; chooses together."""
    if not dist.is_initialized():
        return choose(*list_them(), 0, 1)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [list_them()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return choose(*found[0], dist.get_rank(), dist.get_world_size())


def _everyones(value: str) -> list[str]:
    values = [value]
    if dist.is_initialized():
        values = [""] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def micro_batch(start: Start, world: int, stage: int) -> int | None:
    """That of the checkpoint, if its stage goes on with as many processes: then dropout is the same again."""
    if not start.checkpoint or start.only_weights(stage):
        return None
    return start.meta["config"]["batch_size"] if start.meta["world_size"] == world else None


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(
    meta: dict[str, Any],
    config: Config,
    *,
    start: Start,
    data: dict[str, str],
    classes: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """Adds a line to `start.notices` for what has changed since the checkpoint and may change.

    data: names and fingerprints of what the stream of samples is made from; facts: further values of the present run
    that `meta` has as well (global_batch, world_size).

    Raises:
        UserError: what differs must not; with both values and what to do.
    """
    then, now, path = meta["config"], vars(config), start.checkpoint
    _refuse_classes(meta["classes"], classes, path)
    for name in NETWORK:
        if then.get(name, now[name]) != now[name]:
            raise UserError(
                f"{_another(path, name, then[name], now[name])}; use the same one, or start a new --experiment with "
                "--pretrained-path RUN/last/model.safetensors"
            )
    if start.weights_only:
        start.notices.append(f"weights of {path}, made in {meta['progress']['step']} steps; training starts anew")
        return
    for name in STREAM:
        if _meant(name, then.get(name, now[name])) != _meant(name, now[name]):
            raise UserError(
                f"{_another(path, name, then[name], now[name])}; use the same one, or start a new --experiment with "
                f"--resume {path} --resume-weights-only"
            )
    _compare_data(meta, config, start, data)
    changes = [_change(flag(name)[2:], then[name], now[name]) for name in now if _may_differ(name, then, now)]
    for key, value in facts.items():
        if meta.get(key, value) != value:
            changes.append(_change(key.replace("_", " "), meta[key], value))
    if changes:
        start.notices.append(f"changed since the checkpoint: {', '.join(changes)}")


def _refuse_classes(then: Sequence[str], now: Sequence[str], path: Place) -> None:
    if list(then) == list(now):
        return
    odd = [
        f"{name!r} only {where}"
        for where, a, b in (("then", then, now), ("now", now, then))
        for name in a
        if name not in b
    ]
    raise UserError(
        f"{path} was made for other classes: {len(then)} then, {len(now)} now "
        f"({', '.join(odd[:3]) if odd else 'the same names in another order'}); use that data set, or start a new "
        "--experiment with --pretrained-path RUN/last/model.safetensors, which keeps the backbone"
    )


def _compare_data(meta: dict[str, Any], config: Config, start: Start, data: dict[str, str]) -> None:
    for name, now in (dict.fromkeys(meta["data"], "none") | data).items():
        then = meta["data"].get(name, "none")
        if then == now:
            continue
        difference = _another(start.checkpoint, name, then, now)
        if not config.allow_data_change:
            raise UserError(
                f"{difference} (--data {' '.join(meta['config']['data'])} then, {' '.join(config.data)} now); use the "
                "same, or --allow-data-change to go on in the middle of the new stream, or a new --experiment with "
                "--resume-weights-only"
            )
        start.notices.append(f"{difference}; --allow-data-change: going on all the same")
        meta["progress"]["bad"] = {}  # of the other data set


def _meant(name: str, value: Any) -> Any:
    """The switches of --clean run in one order, however they are written."""
    return switches(value) if name == "clean" else value


def _may_differ(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Lists and tuples are the same in JSON."""
    known = name in then and name not in (*SILENT, *NETWORK, *STREAM)
    plain = list(now[name]) if isinstance(now[name], tuple) else now[name]
    return known and then[name] != plain


def _another(path: Place | None, name: str, then: Any, now: Any) -> str:
    return f"{path} was made with another {name}: {then} then, {now} now"


def _change(name: str, then: Any, now: Any) -> str:
    return f"{name} {_shown(then)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    return "''" if value == "" else " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
