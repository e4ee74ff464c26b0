"""What a run starts from, and whether it may: `--resume`, `--resume-weights-only`, `--allow-data-change`.

A checkpoint says in `meta.json` what it was made with. A difference that changes neither what the weights mean nor
which sample comes next is said in one line; any other is refused with both values and the flag that allows it, because
a run that silently goes on with other data or another order cannot be told from a sound one afterwards.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlc import kept_weights
from mlc.config import Config, flag
from mlc.flags import read_yaml
from mlc.parallel import agree, storage
from mlc.parallel.storage import META, Place
from shards.captions import switches
from shards.console import UserError
from shards.urls import is_url

NETWORK = ("model", "head", "head_kwargs", "model_kwargs")  # other weights
NETWORK += ("text_model", "text_kwargs", "text_pool", "fusion", "fusion_kwargs", "feature_norm")
STREAM = ("seed", "img_size", "model_ema", "clean", "max_tokens")  # another run with the same weights
SCORED_BY = ("val_split", "val_crop", "crop_pct", "threshold", "zero_division")  # other scores of the same weights
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
    "init_head",
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
    """Where a run begins.

    Attributes:
        checkpoint: what to load, None for a new run without one.
        weights_only: only its weights and their average count.
        origin: what a new run starts from, as `--resume` named it; '' for one that goes on, or has none.
        notices: lines for the log.
        meta: what the checkpoint says about itself.
    """

    checkpoint: Place | None = None
    weights_only: bool = False
    origin: str = ""
    notices: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def progress(self) -> dict[str, Any]:
        """The loop's few scalars, where the run goes on from.

        `best`: metrics of the best weights; `stale`: evaluations since; `stage_ends`: (step, samples seen) at the end
        of each stage that is over; `updates_before`: of the average, in the run whose weights this one started from;
        `in_mean`: weights in the mean of --swa-start; `interval`: (sum of losses, steps) since the last line of the
        log; `scaler`: state of the loss scaler.
        """
        new = {"step": 0, "samples_seen": 0, "best": None, "best_step": None, "stale": 0, "bad": {}, "stage_ends": []}
        new |= {"updates_before": 0, "in_mean": 0, "interval": [0.0, 0], "scaler": None, "origin": self.origin}
        then = self.meta.get("progress", {})
        if self.weights_only:
            averaged = self.meta["config"].get("model_ema", True)
            return new | {"updates_before": then["step"] + then.get("updates_before", 0) if averaged else 0}
        if self.origin:  # the other run keeps its best weights, so this one must find its own
            then = then | {"origin": self.origin, "best": None, "best_step": None, "stale": 0}
        return new | then

    def only_weights(self, stage: int) -> bool:
        """Whether weights and their average are all that is taken: by the user's wish, or at the begin of a stage."""
        return self.weights_only or self.meta.get("stage", 0) != stage


def checkpoint_root(checkpoint_dir: str, run: Path) -> Place:
    """Where a run's checkpoints are. Raises UserError for a URL that cannot be used."""
    return storage.at(storage.place(checkpoint_dir), run.name) if checkpoint_dir else run / "checkpoints"


def find(config: Config, run: Path) -> Start:
    """The checkpoint that the flags name, unharmed; every rank gets the same.

    `--resume PATH` starts a new run from another one's checkpoint. A run that has been started so, was stopped, and is
    started again by the same command goes on from its own.

    Raises:
        UserError: there is none at that path, or none that is sound, or the folder holds another run.
    """
    # The first process lists them: its view of a shared disk may be ahead of the others'.
    candidates, start = agree.from_first(lambda: _candidates(config, run))
    start = _first_sound(candidates, start)
    if start.checkpoint:
        start.meta = agree.from_first(lambda: storage.read_meta(start.checkpoint))
    return start


def _candidates(config: Config, run: Path) -> tuple[list[Place], Start]:
    """(checkpoints that may be meant, the best first; what is known of the start)."""
    own = storage.complete(checkpoint_root(config.checkpoint_dir, run))[::-1]
    if config.resume == "auto":
        return own, Start()
    held = bool(own) or (run / "log.jsonl").exists()
    if not config.resume:
        if held and not config.dry_run:
            raise UserError(f"{run} holds a run already; --resume auto goes on with it, or choose another --experiment")
        return [], Start()
    named = at_path(config.resume, "--resume ")
    if _same_place(named[0], *own):
        return named, _within_run(config, run, named[0], own)
    if held and not _begun_from(config.resume, run, own):
        raise UserError(
            f"{run} holds a run that was not started from --resume {config.resume}; --resume auto goes on with it, or "
            "choose another --experiment"
        )
    if own:
        return own, Start(notices=["this run has checkpoints of its own and goes on from them, not from --resume"])
    return named, Start(weights_only=config.resume_weights_only, origin=_absolute(config.resume))


def _within_run(config: Config, run: Path, named: Place, own: Sequence[Place]) -> Start:
    """For a `--resume PATH` inside the run's own folder: its newest checkpoint is meant, or nothing is lost."""
    if config.resume_weights_only:
        raise UserError(f"--resume-weights-only starts a new run: give another --experiment than {run.name}")
    if not _same_place(named, own[0]):
        raise UserError(
            f"--resume {config.resume}: {run} is at step {storage.step_of(own[0])} already, and going back would give "
            "that up; --resume auto goes on from there, another --experiment starts a new run from this checkpoint"
        )
    return Start()


def _begun_from(path: str, run: Path, own: Sequence[Place]) -> bool:
    """Whether the run in this folder started from that path, by its newest checkpoint or its settings."""
    begun = []
    for place in own:
        with suppress(UserError):  # a damaged one is left out later, with a line
            begun = [storage.read_meta(place).get("progress", {}).get("origin", "")]
            break
    if (settings := run / "args.yaml").is_file():
        begun.append(read_yaml(settings).get("resume", ""))
    return any(_absolute(text) == _absolute(path) for text in begun if text not in ("", "auto"))


def _absolute(text: str) -> str:
    return text if is_url(text) else str(Path(text).resolve())


def _same_place(one: Place, *others: Place) -> bool:
    return _absolute(str(one)) in {_absolute(str(other)) for other in others}


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


def _first_sound(candidates: Sequence[Place], start: Start) -> Start:
    """Reads every file of the newest; where it is damaged, says so and takes the one before."""
    part, parts = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for place in candidates:
        # What lies behind a URL has checksums of its storage, and would be downloaded twice.
        reasons = agree.gathered(storage.damage(place, contents=not is_url(place), part=part, parts=parts))
        reason = next(filter(None, reasons), "")
        if not reason:
            start.checkpoint = place
            return start
        start.notices.append(f"{place} is damaged and left out: {reason}")
    if candidates:
        raise UserError("; ".join(start.notices) + "; there is no other checkpoint to go on from")
    return start


def micro_batch(start: Start, world: int, stage: int) -> int | None:
    """That of the checkpoint, if its stage goes on with as many processes: then dropout is the same again."""
    if not start.checkpoint or start.only_weights(stage):
        return None
    return start.meta["config"]["batch_size"] if start.meta["world_size"] == world else None


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(
    start: Start, config: Config, *, data: dict[str, str], classes: Sequence[str], facts: dict[str, Any]
) -> None:
    """Adds a line to `start.notices` for what has changed since the checkpoint and may change.

    data: names and fingerprints of what the stream of samples is made from; facts: further values of the present run
    that the checkpoint's `meta` has as well (global_batch, world_size).

    Raises:
        UserError: what differs must not; with both values and what to do.
    """
    meta, now, path = start.meta, vars(config), start.checkpoint
    then = meta["config"]
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
    if start.origin:
        start.notices.append(f"a new run from {path}; its best weights are those that it finds itself")
    for name in STREAM:
        if _meant(name, then.get(name, now[name])) != _meant(name, now[name]):
            raise UserError(
                f"{_another(path, name, then[name], now[name])}; use the same one, or start a new --experiment with "
                f"--resume {path} --resume-weights-only"
            )
    _compare_data(start, config, data)
    changes = [_change(flag(name)[2:], then[name], now[name]) for name in now if _may_differ(name, then, now)]
    for key, value in facts.items():
        if meta.get(key, value) != value:
            changes.append(_change(key.replace("_", " "), meta[key], value))
    if changes:
        start.notices.append(f"changed since the checkpoint: {', '.join(changes)}")
    other = [flag(name) for name in SCORED_BY if then.get(name, now[name]) != now[name]]
    if other and start.progress["best"]:
        start.progress.update(best=None, best_step=None, stale=0)
        start.notices.append(f"scores with another {other[0]} do not compare: the best weights are looked for anew")


def same_best(run: Path, progress: dict[str, Any]) -> list[str]:
    """Lines for the log, where `best/` was not the one that the checkpoint knows; the same on every process."""
    line, *best = agree.from_first(
        lambda: (kept_weights.restore_best(run, progress), *(progress[name] for name in ("best", "best_step", "stale")))
    )
    progress.update(zip(("best", "best_step", "stale"), best, strict=True))
    return [line] if line else []


def told_apart(config: Config) -> dict[str, Any]:
    """The settings that must be the same on all processes."""
    return {name: value for name, value in vars(config).items() if name not in SILENT}


def compare_rates(start: Start, rate: float) -> None:
    """Adds a line to `start.notices` where the learning rate is about to jump: by another length of the run, say.

    rate: of the next step.
    """
    then = start.meta.get("lr", rate)
    if not math.isclose(then, rate, rel_tol=0.01, abs_tol=1e-12):
        start.notices.append(
            f"the learning rate goes on at {rate:.3g}; with the settings of the checkpoint it would be {then:.3g}"
        )


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


def _compare_data(start: Start, config: Config, data: dict[str, str]) -> None:
    meta = start.meta
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
        start.progress["bad"] = {}  # of the other data set


def _meant(name: str, value: Any) -> Any:
    """The switches of --clean run in one order, however they are written."""
    return switches(value) if name == "clean" else value


def _may_differ(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Lists and tuples are the same in JSON; what `auto` finds is said when it is found."""
    known = name in then and name not in (*SILENT, *NETWORK, *STREAM) and now[name] != "auto"
    plain = list(now[name]) if isinstance(now[name], tuple) else now[name]
    return known and then[name] != plain


def _another(path: Place | None, name: str, then: Any, now: Any) -> str:
    return f"{path} was made with another {name}: {then} then, {now} now"


def _change(name: str, then: Any, now: Any) -> str:
    return f"{name} {_shown(then)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    return "''" if value == "" else " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
