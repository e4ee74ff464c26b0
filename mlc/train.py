"""The training story, top to bottom.

The stream of samples is endless and its order a pure function (mlc/data/order.py); one integer, `samples_seen`, says where a run is.
Learning rate, averaging, mixing and the moments of evaluation are functions of it too. A resumed run therefore only restores
weights, optimizer state and that integer, and goes on as if it had never stopped.
"""

import functools
import json
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mlc.config import Config, read_config
from mlc.data.dataset import Batch, EvalDataset, TarReader, TrainDataset, open_split
from mlc.data.loader import BatchPlan, Waiting, load, plan_batches, train_positions
from mlc.data.mixing import mix_lambda, mixup
from mlc.data.order import DROPOUT, hash64
from mlc.data.transforms import EvalTransform, TrainTransform, build_aa, erase, normalize
from mlc.inference import logits_of_rows, probabilities
from mlc.metrics import multilabel, thresholds
from mlc.models.build import build_model
from mlc.models.export import export, load_exported
from mlc.models.heads import init_head_bias
from mlc.optim.distill import combine, distill_loss
from mlc.optim.ema import Ema, decay_at
from mlc.optim.losses import LOSSES, smooth
from mlc.optim.param_groups import param_groups
from mlc.optim.schedule import lr_at, parse_duration
from mlc.parallel import checkpoint, launch
from mlc.parallel.preempt import StopFlag
from mlc.runlog import Meter, RunLog, duration, memory_gb
from shards.console import UserError
from shards.dataset import Dataset, Index, load_dataset


@launch.peers()
def main(argv: list[str] | None = None) -> int:
    return train(read_config(argv))


def train(config: Config) -> int:
    # ---- Launch -----------------------------------------------------------------------------------------------------
    accelerator = launch.start(config.amp_dtype)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    folder = Path(config.output) / (config.experiment or f"{config.model}-{config.img_size}")
    resume_from = checkpoint.find(config.resume, folder)
    if not config.resume and (folder / "log.jsonl").exists():
        raise UserError(f"{folder} holds a run already; --resume auto goes on with it, another --experiment starts a new one")

    # ---- Data -------------------------------------------------------------------------------------------------------
    dataset = load_dataset(_required(config.data, "--data"))
    train_index = open_split(dataset, config.train_split, labelled=True)
    val_index = open_split(dataset, config.val_split, labelled=True) if config.val_split else None
    plan = plan_batches(config.global_batch_size, config.batch_size, world, pairs=config.mixup > 0)
    clock = Clock(config, len(train_index), plan.global_batch)

    # ---- Model ------------------------------------------------------------------------------------------------------
    launch.seed_everything(config.seed)  # the same first weights on every rank
    model = build_model(name=config.model, num_classes=len(dataset.classes), img_size=config.img_size, head=config.head,
                        pretrained=config.pretrained, pretrained_path=config.pretrained_path or None, drop=config.drop,
                        drop_path=config.drop_path, model_kwargs=config.model_kwargs,
                        grad_checkpointing=config.grad_checkpointing)
    if config.head_bias == "prior":
        init_head_bias(model, (train_index.class_counts() + 1) / (len(train_index) + 2))
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    model.to(device)
    ema = Ema(model) if config.model_ema else None
    teacher = Teacher(config, dataset, device, mean, std) if config.kd_teacher else None
    loss_fn = LOSSES[config.loss]
    if config.loss == "focal":
        loss_fn = functools.partial(loss_fn, gamma=config.focal_gamma, alpha=-1.0 if config.focal_alpha is None else config.focal_alpha)

    # ---- Optimizer --------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.lr, betas=config.opt_betas, eps=config.opt_eps)
    raw_model = model
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- Resume -----------------------------------------------------------------------------------------------------
    # 1. weights  2. optimizer state  3. EMA  4. step, samples_seen and the best value so far. Everything else follows from 4.
    saved = {"model": raw_model, "optimizer": _bare(optimizer), "ema": ema.module if ema else None}
    progress = {"step": 0, "samples_seen": 0, "best": None, "best_step": None}
    if resume_from:
        progress |= _checked(checkpoint.read_meta(resume_from), config, dataset, resume_from)["progress"]
        checkpoint.load(resume_from, **saved)
    step, samples_seen = progress["step"], progress["samples_seen"]

    log = RunLog(folder, config, enabled=accelerator.is_main_process, resumed_step=step if resume_from else None)
    log.say(_introduction(config, dataset, train_index, plan, clock, raw_model, accelerator))
    if resume_from:
        log.say(f"resumed from {resume_from}: step {step}, {samples_seen} samples seen")
    if samples_seen >= clock.total:
        log.say(f"{folder} is finished ({samples_seen} of {clock.total} samples); --epochs or --max-steps would lengthen it")
        return 0
    sample_log = SampleLog(config, train_index, accelerator, append_after=step) if config.log_samples else None
    stop = StopFlag(folder, watches_file=accelerator.is_main_process)

    # ---- Evaluation and checkpoints -----------------------------------------------------------------------------------
    def evaluate_and_keep_best() -> None:
        launch.same_buffers(raw_model, ema.module if ema else None)
        results = {name: evaluate(m, val_index, config, dataset, accelerator, loss_fn, mean, std)
                   for name, m in {"val": raw_model, "val_ema": ema.module if ema else None}.items() if m is not None}
        clock_now = {"step": step, "samples_seen": samples_seen, "epoch": round(clock.epoch(samples_seen), 4)}
        log.write(**clock_now, **{f"{name}/{key}": value for name, values in results.items() for key, value in values.items()})
        log.say(_evaluation_line(step, results))
        name = max(results, key=lambda name: _goodness(results[name], config.eval_metric))
        if progress["best"] is None or _goodness(results[name], config.eval_metric) > _goodness(progress["best"], config.eval_metric):
            progress.update(best=results[name], best_step=step)
            keep(folder / "best", ema.module if name == "val_ema" else raw_model, results[name])
        keep(folder / "last", ema.module if ema else raw_model, results["val_ema" if ema else "val"])

    def keep(where: Path, weights: torch.nn.Module, result: dict[str, float]) -> None:
        if accelerator.is_main_process:
            export(weights, where, architecture=raw_model.pretrained_cfg["architecture"], model_args=_model_args(config),
                   num_classes=len(dataset.classes), label_names=list(dataset.classes), img_size=config.img_size, mean=mean, std=std,
                   crop_mode="squash" if config.val_crop == "squish" else "center", crop_pct=config.crop_pct,
                   extra={"step": step, "data": dataset.fingerprint})
            thresholds.save(where / "thresholds.json", metric="f1_samples", threshold=result["threshold"], value=result["f1_samples@tuned"])

    def save_checkpoint() -> None:
        launch.same_buffers(raw_model, ema.module if ema else None)
        progress.update(step=step, samples_seen=samples_seen)
        meta = {"progress": progress, "config": vars(config), "data": dataset.fingerprint, "classes": list(dataset.classes),
                "global_batch": plan.global_batch, "world_size": world, "versions": {"torch": torch.__version__}}
        checkpoint.save(folder / "checkpoints" / f"step-{step:08d}", meta, **saved)
        if accelerator.is_main_process:
            checkpoint.prune(folder / "checkpoints", config.checkpoint_hist)

    # ---- Loop -------------------------------------------------------------------------------------------------------
    transform = TrainTransform(size=config.img_size, scale=config.scale, ratio=config.ratio, hflip=config.hflip, vflip=config.vflip,
                               aa=config.aa, crop=config.crop, mean=mean)
    positions = train_positions(samples_seen, clock.total, plan, rank)
    batches = Waiting(load(TrainDataset(train_index, transform, config.seed), positions, workers=config.workers, device=device), device)
    elements = plan.global_batch * len(dataset.classes)  # the loss is a sum divided once by the count of the whole step
    meter, interval_loss, interval_steps, in_flight = Meter(), torch.zeros((), device=device), 0, None
    model.train()
    while samples_seen < clock.total:
        lr = clock.lr(samples_seen)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss = torch.zeros((), device=device)
        for micro in range(plan.accumulation):
            batch = next(batches)
            launch.seed_everything(int(hash64(config.seed, DROPOUT, step, rank, micro)[0]) >> 1)
            image, target, lam = prepare(batch, config, mean, std, mixing=samples_seen < clock.mixup_off)
            last = micro == plan.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    logits = model(image)
                loss = loss_fn(logits, smooth(target, config.smoothing))
                if teacher:
                    loss = combine(loss, distill_loss(logits, teacher(image), config.kd_temp), config.kd_alpha)
                loss = loss.sum() / elements
                accelerator.backward(loss * world)  # DDP averages over ranks what should be a sum
            step_loss += loss.detach()
            if sample_log:
                sample_log.add(batch, lam)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        if not math.isfinite(grad_norm) and accelerator.scaler is None:
            raise UserError(f"step {step + 1}: the gradient is {float(grad_norm)}; the weights were not changed and the last checkpoint is good. "
                            f"Try a lower --lr, --clip-grad 1 or --amp-dtype bf16, then --resume auto; --log-samples names the images")
        optimizer.step()
        optimizer.zero_grad()
        step, samples_seen = step + 1, samples_seen + plan.global_batch
        if ema:
            ema.update(raw_model, decay_at(step, config.model_ema_decay, config.model_ema_warmup))
        if sample_log:
            sample_log.write(step)

        # The stop flag rides on the loss's all-reduce and is read one step later, on all ranks alike, without waiting for the device.
        arrived, in_flight = in_flight, launch.all_sum(torch.stack([step_loss, torch.tensor(float(stop.check()), device=device)]))
        interval_loss += in_flight[0]
        interval_steps += 1
        stopping = arrived is not None and arrived[1].item() > 0
        meter.add(plan.global_batch)
        if step % config.log_interval == 0 or samples_seen >= clock.total or step == 1:
            rate, seconds = meter.take()
            line = {"step": step, "samples_seen": samples_seen, "epoch": round(clock.epoch(samples_seen), 4),
                    "train/loss": interval_loss.item() / interval_steps, "train/lr": lr, "train/grad_norm": float(grad_norm),
                    "train/img_per_sec": rate, "data/wait_frac": batches.take_seconds() / seconds, "sys/mem_gb": memory_gb(device)}
            log.write(**line)
            log.say(_training_line(line, clock))
            interval_loss.zero_()
            interval_steps = 0
        at_end = samples_seen >= clock.total
        with meter.paused():
            if val_index is not None and (at_end or clock.passed("eval_every", samples_seen)):
                evaluate_and_keep_best()
            if at_end or stopping or clock.passed("checkpoint_every", samples_seen):
                save_checkpoint()
        if stopping and not at_end:
            log.say(f"stopped at step {step}, checkpoint saved; the same command with --resume auto goes on")
            break
    else:
        log.say(_farewell(folder, progress, config))
    log.close()
    accelerator.end_training()
    return 0


# ---- the clock -------------------------------------------------------------------------------------------------------


class Clock:
    """Everything that depends on how far the run is, as functions of samples_seen; durations are converted once."""

    def __init__(self, config: Config, epoch_samples: int, global_batch: int):
        to_samples = functools.partial(parse_duration, epoch_samples=epoch_samples, global_batch=global_batch)
        steps = config.max_steps or max(1, math.ceil(config.epochs * epoch_samples / global_batch))
        self.epoch_samples, self.global_batch, self.total = epoch_samples, global_batch, steps * global_batch
        self._every = {name: to_samples(getattr(config, name)) for name in ("eval_every", "checkpoint_every")}
        self.mixup_off = to_samples(config.mixup_off) if config.mixup_off else math.inf
        self.lr = functools.partial(lr_at, base_lr=config.lr, total=self.total, warmup=to_samples(config.warmup), warmup_lr=config.warmup_lr,
                                    min_lr=config.min_lr, sched=config.sched, decay_every=to_samples(config.decay_every), decay_rate=config.decay_rate)

    def epoch(self, samples_seen: int) -> float:
        return samples_seen / self.epoch_samples

    def passed(self, event: str, samples_seen: int) -> bool:
        """Whether the last step reached or crossed a multiple of the event's interval."""
        every = self._every[event]
        return samples_seen // every > (samples_seen - self.global_batch) // every


# ---- one batch -------------------------------------------------------------------------------------------------------


def prepare(batch: Batch, config: Config, mean, std, *, mixing: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Batch -> (image float32 [B, 3, H, W], target [B, C], lambda [B] or None): normalised, erased and mixed on the device."""
    image, target = normalize(batch["image"], mean, std), batch["target"]
    if config.reprob:
        image = erase(image, batch["position"], prob=config.reprob, mode=config.remode, seed=config.seed)
    if not (config.mixup and mixing):
        return image, target, None
    lam = mix_lambda(batch["position"], alpha=config.mixup, prob=config.mixup_prob, seed=config.seed)
    return *mixup(image, target, lam), lam


class Teacher:
    """Logits of a trained model on the student's images, whatever size and normalisation the teacher was trained with."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, mean, std):
        folder = Path(config.kd_teacher)
        self._model, info = load_exported(folder / "best" if (folder / "best").is_dir() else folder)
        if info["label_names"] != list(dataset.classes):
            raise UserError(f"--kd-teacher {folder} was trained on other classes than {config.data}")
        self._model.to(device).requires_grad_(False)
        self._size = info["pretrained_cfg"]["input_size"][-1]
        as_tensor = functools.partial(torch.tensor, device=device)
        own_mean, own_std = as_tensor(info["pretrained_cfg"]["mean"]), as_tensor(info["pretrained_cfg"]["std"])
        self._scale = (as_tensor(std) / own_std).view(1, -1, 1, 1)
        self._shift = ((as_tensor(mean) - own_mean) / own_std).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image * self._scale + self._shift
        if image.shape[-1] != self._size:
            image = torch.nn.functional.interpolate(image, size=self._size, mode="bicubic", align_corners=False)
        return self._model(image)


class SampleLog:
    """`--log-samples`: which images, seen how, made each step; one JSON line per step on rank 0."""

    def __init__(self, config: Config, index: Index, accelerator: Accelerator, append_after: int):
        self._index, self._accelerator, self._rows = index, accelerator, []
        self._file = None
        if accelerator.is_main_process:
            path = Path(config.log_samples)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= append_after] if path.exists() else []
            self._file = path.open("w", buffering=1)
            self._file.writelines(line + "\n" for line in kept)

    def add(self, batch: Batch, lam: torch.Tensor | None) -> None:
        """Takes one micro-batch: position, row, crc32 of the augmented uint8 image, own share of the mix."""
        image = batch["image"].cpu().numpy()
        shares = [1.0] * len(image) if lam is None else lam.tolist()
        crcs = [zlib.crc32(np.ascontiguousarray(pixels)) for pixels in image]
        self._rows += zip(batch["position"].tolist(), batch["row"].tolist(), crcs, shares, strict=True)

    def write(self, step: int) -> None:
        rows = sorted(gather_object(self._rows))
        self._rows = []
        if self._file:
            keys = {position: self._index.key(row) for position, row, _, _ in rows}
            partners = [keys[position ^ 1] if share < 1 else None for position, _, _, share in rows]
            self._file.write(json.dumps({"step": step, "first_position": rows[0][0], "keys": list(keys.values()), "crc32": [row[2] for row in rows],
                                         "partner": partners, "lambda": [round(row[3], 7) for row in rows]}) + "\n")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(model: torch.nn.Module, index: Index, config: Config, dataset: Dataset, accelerator: Accelerator, loss_fn, mean, std) -> dict[str, float]:
    """Exact metrics of one split, the same on every rank."""
    n = len(index)
    logits = np.empty((n, len(dataset.classes)), np.float32)
    eval_data = EvalDataset(TarReader(index), EvalTransform(size=config.img_size, crop=config.val_crop, crop_pct=config.crop_pct))
    for rows, values in logits_of_rows(model, eval_data, accelerator, batch_size=config.validation_batch_size or config.batch_size,
                                       workers=min(config.workers, 2), mean=mean, std=std):
        logits[rows] = values[:, 0]
    target = index.targets(np.arange(n))
    loss = loss_fn(torch.from_numpy(logits), torch.from_numpy(target)).double().mean().item()
    columns = {group: [dataset.classes.index(name) for name in names] for group, names in dataset.groups.items()}
    scores = probabilities(logits[:, None])
    return {"loss": loss, **dict(multilabel.evaluate(scores, target > 0.5, threshold=config.threshold, groups=columns))}


def _goodness(result: dict[str, float], metric: str) -> float:
    if metric not in result:
        raise UserError(f"--eval-metric {metric} is not measured; choose one of {', '.join(result)}")
    return -result[metric] if metric == "loss" else result[metric]


# ---- small print -----------------------------------------------------------------------------------------------------


def _required(value: str, name: str) -> str:
    if not value:
        raise UserError(f"{name} is missing")
    return value


def _bare(optimizer):
    """torch's optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _model_args(config: Config) -> dict[str, Any]:
    return config.model_kwargs | {"img_size": config.img_size}


def _checked(meta: dict[str, Any], config: Config, dataset: Dataset, path: Path) -> dict[str, Any]:
    """The meta data of a checkpoint that this run can go on from."""
    for name, then, now in (("data set", meta["data"], dataset.fingerprint), ("--seed", meta["config"]["seed"], config.seed),
                            ("--model", meta["config"]["model"], config.model), ("--img-size", meta["config"]["img_size"], config.img_size)):
        if then != now:
            raise UserError(f"{path} was made with another {name}: {then} then, {now} now; an exact resume needs the same one")
    return meta


def _introduction(config, dataset, index, plan: BatchPlan, clock: Clock, model, accelerator) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    steps = clock.total // plan.global_batch
    return (f"{config.model} at {config.img_size} px, {parameters / 1e6:.1f} M parameters; {len(index)} training samples, {len(dataset.classes)} classes\n"
            f"{plan}; {steps} steps = {clock.epoch(clock.total):.2f} epochs; {accelerator.device.type}, "
            f"{accelerator.distributed_type.value.lower()}, autocast {accelerator.mixed_precision}")


def _training_line(line: dict[str, float], clock: Clock) -> str:
    total = clock.total // clock.global_batch
    left = (clock.total - line["samples_seen"]) / line["train/img_per_sec"]
    return (f"step {line['step']}/{total} ({line['samples_seen'] / clock.total:4.0%})  epoch {line['epoch']:.2f}  loss {line['train/loss']:.4f}  "
            f"lr {line['train/lr']:.2e}  grad {line['train/grad_norm']:.2f}  {line['train/img_per_sec']:.0f} img/s  "
            f"wait {line['data/wait_frac']:.0%}  mem {line['sys/mem_gb']:.1f} GB  left {duration(left)}")


def _evaluation_line(step: int, results: dict[str, dict[str, float]]) -> str:
    parts = [f"{name}: loss {r['loss']:.4f}  mAP {r['map']:.4f}  F1 samples {r['f1_samples']:.4f} (tuned {r['f1_samples@tuned']:.4f} at {r['threshold']:.2f})"
             f"  micro {r['f1_micro']:.4f}  macro {r['f1_macro']:.4f}" for name, r in results.items()]
    return "\n".join(f"step {step}  {part}" for part in parts)


def _farewell(folder: Path, progress: dict[str, Any], config: Config) -> str:
    if progress["best"] is None:
        return f"done; checkpoints in {folder / 'checkpoints'}"
    return f"done; best {config.eval_metric} {progress['best'][config.eval_metric]:.4f} at step {progress['best_step']}, weights in {folder / 'best'}"
