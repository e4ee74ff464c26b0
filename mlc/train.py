"""The training story, top to bottom.

The stream of samples is endless and its order a pure function (mlc/data/order.py); one integer, `samples_seen`, says
where a run is. Learning rate, averaging, mixing and the moments of evaluation are functions of it too. A resumed run
therefore restores weights, optimizer state and that integer, and goes on as if it had never stopped.
"""

import gc
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from mlc import auto, batch_size, kept_weights, rehearsal, resume, stages
from mlc.batch_size import in_evaluation, in_training
from mlc.captions import by_length, decodes_images, model_name, open_reading, refuse_untrainable
from mlc.clock import Clock
from mlc.config import Config
from mlc.data.batch import prepare, random_batch, train_transform
from mlc.data.dataset import BadSamples, TrainDataset
from mlc.data.loader import Waiting, load, readers, train_positions
from mlc.data.mixing import together
from mlc.data.order import DROPOUT, hash64
from mlc.data.sources import open_sources, open_validation, validation_features
from mlc.flags import read_config
from mlc.metrics import thresholds
from mlc.mining import PART, open_mining
from mlc.models.build import fast_memory_format
from mlc.models.export import export, timm_config
from mlc.models.freeze import freeze, train_mode
from mlc.non_finite import NonFiniteGuard
from mlc.objective import Objective, make_loss, trained_columns
from mlc.optim.ema import Ema
from mlc.optim.optimizers import set_steps
from mlc.parallel import agree, checkpoint, compiler, launch, strategy
from mlc.parallel.memory import to_device
from mlc.parallel.preempt import StopFlag
from mlc.parallel.recompute import recompute
from mlc.profiling import Profiler
from mlc.report.samples import sample_table
from mlc.runlog import Meter, RunLog, SampleLog, evaluation_line, memory_gb, training_line
from mlc.setup import model_of, optimizer_of, refuse_sizes
from mlc.validation import Evaluation, Standing, decision_rule, evaluate, goodness, notes, refuse_unknown_metric
from shards.console import shown


class Ended(Enum):
    """Why the loop ended. Where several reasons meet, the first of these counts."""

    FINISHED = "the run has its length"
    PATIENCE = "no evaluation of the last stage was better for too long"
    STOPPED = "somebody asked for it; the same command goes on"
    STAGE = "the next stage begins"


def why_ended(*, finished: bool, stopped: bool, stage_over: bool, last_stage: bool) -> Ended | None:
    """None for a run that goes on. `stage_over`: it has its length, or patience ends it."""
    if finished:
        return Ended.FINISHED
    if stage_over and last_stage:
        return Ended.PATIENCE
    if stopped:
        return Ended.STOPPED
    return Ended.STAGE if stage_over else None


@launch.peers()
@readers()
def main(argv: list[str] | None = None) -> int:
    config = read_config(argv)
    with rehearsal.shortened(config) if config.dry_run else nullcontext(config) as config, in_training(config):
        asked, stop = config.batch_size, train(config)
        while stop:  # the end of a stage; the next one begins as if it were resumed
            gc.collect()
            config = replace(config, resume="auto", resume_weights_only=False, batch_size=asked)
            stop = train(config, stop)
    return 0


def train(settings: Config, stop: StopFlag | None = None) -> StopFlag | None:
    """Trains one stage of a run (mostly the only one). Returns the flag to give to the next stage, None for the end."""
    # ---- Launch ------------------------------------------------------------------------------------------------------
    choice = strategy.choose(settings.strategy)
    accelerator = launch.start(settings.amp_dtype, group=choice.divided)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    folder = Path(settings.output) / (settings.experiment or f"{settings.model}-{settings.img_size}")
    launch.own(folder)
    start = resume.find(settings, folder)

    # ---- Data --------------------------------------------------------------------------------------------------------
    sources = open_sources(settings)
    dataset, sampler = sources.dataset, sources.sampler
    validation = open_validation(settings, dataset)
    refuse_unknown_metric(settings.eval_metric, dataset)
    if validation:
        start.notices.extend(notes(settings, dataset, validation[0].index, validation[1]))
    reading = open_reading(settings, sources, start.checkpoint, folder)
    val_captions = reading.evaluation(validation[0].index) if reading and validation else None
    val_features = validation_features(settings, dataset, validation)
    plan = batch_size.plan(settings, choice, world)
    progress = start.progress
    lengths = {"epoch_samples": sampler.epoch_samples, "global_batch": plan.global_batch}
    asked = stages.lay_out(settings, **lengths, ended=progress["stage_ends"])
    parts, chosen = zip(*(auto.with_numbers(part, plan.global_batch) for part in asked), strict=True)
    clocks = [Clock(part, **lengths) for part in parts]  # all now, so that the last one's mistake shows at the start
    for part in parts:
        make_loss(part.config, dataset.group_columns)
    refuse_sizes([part.config for part in parts], sources)
    stage = stages.at(parts, progress["samples_seen"], progress["stage_ends"])
    clock, config = clocks[stage.number], stage.config  # from here on the settings of this stage
    start.notices.extend(chosen[stage.number])
    if config.kd_teacher != settings.kd_teacher:
        sources = open_sources(config)  # with its soft labels

    # ---- Resume ------------------------------------------------------------------------------------------------------
    # 1. weights  2. optimizer state  3. EMA  4. step, samples_seen and the best value; all else is a function of 4.
    step, samples_seen = progress["step"], progress["samples_seen"]
    facts = {"global_batch": plan.global_batch, "world_size": world, "strategy": choice.name}
    facts |= {"autocast": accelerator.mixed_precision, "versions": {"torch": torch.__version__}}
    identity = sources.identity()
    agree.require_same(resume.told_apart(settings) | identity | facts)
    only_weights = bool(start.checkpoint) and start.only_weights(stage.number)
    if start.checkpoint:
        resume.compare(start, settings, data=identity, classes=dataset.classes, facts=facts)
        if reading:
            reading.compare(start.meta, start.checkpoint)
        then = start.meta.get("strategy", "ddp")
        strategy.refuse_other_files(then, choice.name, path=start.checkpoint, weights_only=only_weights)
        if not only_weights:
            resume.compare_rates(start, clock.lr(samples_seen))
        elif not start.weights_only:  # a stage begins
            progress["stale"] = 0
        if not start.origin:
            start.notices += resume.same_best(folder, progress)

    # ---- Model -------------------------------------------------------------------------------------------------------
    if config.deterministic:
        launch.only_deterministic()
    launch.seed_everything(config.seed)  # the same first weights on every rank
    model = model_of(config, sources, reading, published=not start.checkpoint)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    transform = train_transform(config, mean)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    frozen = freeze(model, config.freeze)
    if config.memory_format == "auto" and choice.name == "ddp":  # the others take contiguous weights only
        model.to(memory_format=fast_memory_format(model, device))
    bare = model.to(device)  # what is averaged, evaluated and saved; the strategy may wrap it for training
    ema = Ema(bare) if config.model_ema else None
    averaged = ema.module if ema else None
    objective = Objective.of(
        config,
        dataset,
        sampler,
        student=bare,
        averaged=averaged,
        device=device,
        normalization=(mean, std),
        autocast=accelerator.autocast,
        reading=reading,
    )

    # ---- Optimizer ---------------------------------------------------------------------------------------------------
    make_optimizer = partial(optimizer_of, config=config, only_elementwise=choice.zero_stage > 0)
    if config.compile:
        compiler.need_compiler(device)
        for module in (bare, *(teacher.model for teacher in objective.teachers)):
            compiler.compile_blocks(module, config.compile_mode)
    recomputed = recompute(bare, config.grad_checkpointing)
    if reading:
        refuse_untrainable(bare, config, recomputed=recomputed, zero_stage=choice.zero_stage)

    def trial(size: int) -> None:
        files = len(sources.soft) if sources.soft else 0
        images = decodes_images(config)
        batch = random_batch(size, config.img_size, len(dataset.classes), device, soft=files, images=images)
        batch |= reading.random(size, device) if reading else {}
        batch |= sources.features.random(size, device) if sources.features else {}
        image, target, mix = prepare(batch, config, mean, std, mixing=True)
        objective(bare, image, target, batch, mix)[0].backward()

    if config.batch_size != "auto":
        batch_size.check_one_image(plan, trial, bare, device)
    else:
        plan, found = batch_size.find(
            plan,
            trial,
            together=together(config),
            choice=choice,
            model=bare,
            averaged=averaged,
            device=device,
            before=resume.micro_batch(start, world, stage.number),
        )
        # From here on the run is the one with this number given by hand.
        settings.batch_size = config.batch_size = plan.batch_size
        start.notices.append(found)
    if config.dry_run and validation:
        validation = validation[0], validation[1][: 2 * config.batch_size]
    compilations = compiler.Compilations()
    if only_weights:
        checkpoint.load_weights(start.checkpoint, model=bare, ema=averaged)
    divided = strategy.divide(
        choice,
        accelerator,
        bare,
        averaged,
        make_optimizer,
        clip=config.clip_grad,
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
    )
    model = divided.model
    if start.checkpoint and not only_weights:
        checkpoint.load(start.checkpoint, **divided.saved)
        set_steps(divided.optimizer, step - stage.first_step)
        if accelerator.scaler is not None and progress["scaler"]:
            accelerator.scaler.load_state_dict(progress["scaler"])

    # ---- Logs --------------------------------------------------------------------------------------------------------
    log = RunLog(
        folder,
        settings,
        enabled=accelerator.is_main_process,
        resumed_step=step if start.checkpoint else None,
        steps=step + clock.steps_left(samples_seen),
    )
    if reading and accelerator.is_main_process:
        reading.save(bare, folder)
    log.say(f"{model_name(config)}, {parameters:.1f} M parameters, on {device.type}")
    log.say(
        f"{sampler.epoch_samples} training samples an epoch, {len(dataset.classes)} classes; autocast "
        f"{accelerator.mixed_precision}, {choice.name}"
    )
    for text in sources.describe():
        log.say(text)
    log.say(f"{plan}; {step + clock.steps_left(samples_seen)} steps = {clock.epoch(clock.total):.2f} epochs")
    for text in start.notices:
        log.say(text)
    if start.checkpoint and not start.weights_only:
        log.say(f"resumed from {start.checkpoint}: step {step}, {samples_seen} samples seen")
    if len(parts) > 1:
        changed = ", ".join(f"{name} {value}" for name, value in settings.stages[stage.number].items() if name != "for")
        until = clock.epoch(stage.end)
        log.say(f"stage {stage.number + 1} of {len(parts)}, until epoch {until:.2f}: {changed or 'as the run'}")
    if frozen:
        log.say(f"{frozen / 1e6:.1f} M of the parameters are not trained (--freeze {config.freeze})")

    def out_of_patience() -> bool:
        return settings.patience is not None and progress["stale"] >= settings.patience

    if samples_seen >= clock.total or (stage.last and out_of_patience()):
        log.say(f"{folder} is finished at {samples_seen} of {clock.total} samples; more --epochs or --max-steps go on")
        return None
    sample_log = None
    if config.log_samples:
        sample_log = SampleLog(
            Path(config.log_samples), [rows.index for rows in sampler.sources], accelerator, resumed_step=step
        )
    bad, val_bad = BadSamples(config.max_bad_samples, progress["bad"]), BadSamples(config.max_bad_samples)
    stop = stop or StopFlag(folder, watches_file=accelerator.is_main_process)
    root = resume.checkpoint_root(config.checkpoint_dir, folder)
    saver = checkpoint.Saver(root, keep=config.checkpoint_hist, background=config.checkpoint_async, say=log.say)

    # ---- Evaluation and checkpoints ----------------------------------------------------------------------------------
    saved = {"best_step": progress["best_step"]}  # what the newest checkpoint says
    standing = None
    if validation and accelerator.is_main_process:
        standing = Standing.of(settings, sources, validation[0].index, validation[1])

    def evaluate_and_keep_best() -> None:
        launch.same_buffers(bare, averaged)
        weights = {"val": bare} | ({"val_ema": averaged} if ema else {})
        with compiler.eager(), in_evaluation(config):
            told = (config, dataset, accelerator, objective.loss, mean, std, val_bad, val_captions, val_features, step)
            results = evaluate(weights, *validation, *told)
        metrics = {name: result.metrics for name, result in results.items()}
        best_now = max(metrics, key=lambda name: goodness(metrics[name], config.eval_metric))
        samples = None
        if accelerator.is_main_process and config.log_wandb:
            samples = sample_table(validation[0], results[best_now], dataset.classes, config.wandb_samples)
        values = {f"{name}/{key}": value for name, found in metrics.items() for key, value in found.items()}
        log.write(step=step, samples_seen=samples_seen, epoch=clock.epoch(samples_seen), **values, samples=samples)
        for name, found in metrics.items():
            log.say(evaluation_line(step, name, found))
        first, rule = progress["best"] is None, None
        if goodness(metrics[best_now], config.eval_metric) > goodness(progress["best"], config.eval_metric):
            progress.update(best=metrics[best_now], best_step=step, stale=0)
            rule = keep("best", weights[best_now], results[best_now])
            if standing:
                standing.keep(results[best_now], rule)
        else:
            progress["stale"] += 1
        if first and samples_seen < clock.total:
            say_standing()
        last = "val_ema" if ema else "val"
        keep("last", weights[last], results[last], rule if last == best_now else None)

    def say_standing() -> None:
        for text in standing.lines(progress["best"]) if standing else ():
            log.say(text)

    def keep(
        which: str, weights: torch.nn.Module, found: Evaluation | None, rule: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The rule by which these weights predict labels, on the first process; found anew unless it is known."""
        state = strategy.full_state(weights)
        if not accelerator.is_main_process:
            return {}
        rule = rule or decision_rule(found, validation and validation[0].index, config, dataset)
        saved_best = saved["best_step"] if which == "best" else None
        with kept_weights.written_whole(folder, which, keep_step=saved_best) as building:
            export(weights, building, state=state, **described())
            if reading:
                reading.tokenizer.save(building / "text")
            thresholds.write(building / "thresholds.json", rule)
        return rule

    def described() -> dict[str, Any]:
        return {
            "architecture": bare.pretrained_cfg["architecture"],
            "model_args": config.model_kwargs | {"img_size": config.img_size},
            "num_classes": len(dataset.classes),
            "label_names": dataset.classes,
            "img_size": config.img_size,
            "mean": mean,
            "std": std,
            "crop": config.val_crop,
            "crop_pct": config.crop_pct,
            "extra": {"step": step, "data": sources.fingerprint, "columns": asdict(dataset.columns)}
            | (reading.described(config) if reading else {})
            | (sources.features.described() if sources.features else {}),
        }

    def save_checkpoint() -> None:
        launch.same_buffers(bare, averaged)
        scaler = accelerator.scaler and accelerator.scaler.state_dict()
        interval = [interval_loss.item(), interval_steps]
        progress.update(step=step, samples_seen=samples_seen, bad=bad.known, interval=interval, scaler=scaler)
        saved["best_step"] = progress["best_step"]
        meta = {
            "progress": progress,
            "epoch": clock.epoch(samples_seen),
            "lr": clock.lr(samples_seen),
            "config": vars(settings),
            "stage": stage.number,
            "data": identity,
            "classes": dataset.classes,
            "export": timm_config(bare, **described()),
            **(reading.facts() if reading else {}),
            **facts,
        }
        saver.save(step, meta, **divided.saved, more={PART: mining.state()} if mining else None)

    # ---- Loop --------------------------------------------------------------------------------------------------------
    stream = TrainDataset(
        sampler,
        sources.readers,
        transform,
        config.seed,
        max_bad=config.max_bad_samples,
        soft=sources.soft,
        captions=reading and reading.training(config, sources),
        features=sources.features,
        images=decodes_images(config),
    )
    trained = trained_columns(config, dataset.group_columns, len(dataset.classes))
    mining = open_mining(config, sampler, device, trained)
    if mining and start.checkpoint and not start.weights_only and not mining.restore(start.checkpoint):
        log.say("--hard-mining: the checkpoint has no losses of these samples; this epoch repeats random ones")

    def read_on() -> Waiting:
        """From here to the end of the stage, or as far as it is known which samples are the hardest."""
        until = min(stage.end, mining.until(plan.global_batch)) if mining else stage.end
        positions = train_positions(samples_seen, until, plan, rank, by_length(stream, config))
        return Waiting(load(stream, positions, workers=config.workers, device=device), device)

    if mining:
        mining.renew(samples_seen, plan.global_batch)
    batches = read_on()
    elements = plan.global_batch * len(trained)  # the loss is a sum, divided once by the whole step's count
    interval_loss, interval_steps = torch.tensor(progress["interval"][0], device=device), progress["interval"][1]
    meter, indexes = Meter(), [rows.index for rows in sampler.sources]
    guard = NonFiniteGuard(step, scaler=accelerator.scaler is not None, folder=folder, indexes=indexes)
    in_flight: launch.Arriving | None = None
    met: list[tuple[str, str]] = []  # bad samples that this rank met and the others do not know of yet
    profiler = Profiler(folder, device, log.say) if config.profile and accelerator.is_main_process else None
    train_mode(model)
    ended: Ended | None = None
    while not ended:
        lr = clock.lr(samples_seen)
        for group in divided.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if mining and mining.renew(samples_seen, plan.global_batch):
            batches = read_on()
        step_loss = torch.zeros((), device=device)
        for micro in range(plan.accumulation):
            batch = next(batches)
            if len(batch["bad"]):
                met += map(stream.problem, batch["bad"].tolist())
            launch.seed_everything(int(hash64(config.seed, DROPOUT, step, rank, micro)[0]) >> 1)
            image, target, mix = prepare(batch, config, mean, std, mixing=samples_seen < clock.mixup_off)
            last = micro == plan.accumulation - 1
            with divided.accumulate(last):
                loss, logits = objective(model, image, target, batch, mix)
                loss = loss / elements
                if config.dry_run and step == micro == 0:
                    log.say(rehearsal.shapes(batch, image=image, target=target, logits=logits))
                divided.backward(loss * world)  # it takes the mean over ranks of what should be a sum
            batches.prepare()
            if mining:
                mining.add(batch, logits, target, mix)
            step_loss += loss.detach()
            guard.saw(step + 1, batch, loss)
            if sample_log:
                sample_log.add(batch, mix)
        grad_norm = divided.step()
        step, samples_seen = step + 1, samples_seen + plan.global_batch
        averaging = {"updates": progress["updates_before"] + step, "in_mean": progress["in_mean"]}
        if ema and (decay := clock.averaging(samples_seen, **averaging)) is not None:
            ema.update(bare, decay)
            progress["in_mean"] += clock.in_swa(samples_seen)
        if sample_log:
            sample_log.write(step)

        # The gradient's norm, the stop flag, the number of bad samples and rank 0's clock ride on the loss's
        # all-reduce. They are read one step later, on all ranks alike, when they have arrived anyway: nobody waits for
        # the device.
        if in_flight is None:  # compiling and cold caches are over
            launch.set_timeout(config.collective_timeout, *divided.groups)
        _, norm, stopped, found, clock_due = in_flight.read() if in_flight else [0.0] * 5
        guard.check(step - 1, norm)
        due = accelerator.is_main_process and clock.checkpoint_due()
        riders = to_device(torch.tensor([stop.check(), len(met), due], dtype=torch.float32), device)
        in_flight = launch.Arriving(torch.cat([step_loss[None], grad_norm[None].float() / world, riders]))
        at_end, stage_end = samples_seen >= clock.total, samples_seen >= stage.end
        evaluating = validation and (at_end or clock.passed("eval_every", samples_seen))
        saving = stage_end or stopped > 0 or clock_due > 0 or clock.passed("checkpoint_every", samples_seen)
        if saving or evaluating:
            _, norm, stopped_now, found_now, _ = in_flight.read()
            guard.check(step, norm, at_end=at_end)
            found += found_now
            stopped += stopped_now
        if found > 0:
            for text in bad.add(gather_object(met)):
                log.say(text)
            met = []
        interval_loss += in_flight.values[0]
        interval_steps += 1
        meter.add(plan.global_batch)
        log.advance(step)
        if profiler:
            profiler.step()
        if config.compile and (text := compilations.new()):
            log.say(f"step {step}: {text}")
        if step == 1 or step % config.log_interval == 0 or at_end:
            rate, seconds = meter.take()
            line = {
                "step": step,
                "samples_seen": samples_seen,
                "epoch": clock.epoch(samples_seen),
                "train/loss": interval_loss.item() / interval_steps,
                "train/lr": lr,
                "train/grad_norm": float(grad_norm),
                "train/img_per_sec": rate,
                "data/wait_frac": batches.take_seconds() / seconds,
                "data/bad_samples": len(bad),
                "sys/mem_gb": memory_gb(device),
                **saver.take_seconds(),
            }
            log.write(**line)
            log.say(training_line(line, clock))
            interval_loss.zero_()
            interval_steps = 0
        with meter.paused():
            if evaluating:
                evaluate_and_keep_best()
            if not validation and at_end:
                keep("last", averaged or bare, None)
            exhausted = bool(evaluating) and not at_end and out_of_patience()
            if exhausted:
                what = f"stage {stage.number + 1} " if len(parts) > 1 else ""
                waited = f"no better {config.eval_metric} in {settings.patience} evaluations"
                log.say(f"{waited}: {what}ended at step {step}")
            over = stage_end or exhausted
            if over and not stage.last:
                progress["stage_ends"].append((step, samples_seen))
            ended = why_ended(finished=at_end, stopped=stopped > 0, stage_over=over, last_stage=stage.last)
            if saving or ended:
                save_checkpoint()
            if ended:
                saver.finish()

    # ---- End ---------------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        kept_weights.forget_aside(folder)
    if ended is Ended.STOPPED:
        log.say(f"stopped at step {step}, checkpoint saved; the same command with --resume auto goes on")
    elif ended is not Ended.STAGE:
        best = progress["best"]
        if best:
            log.say(f"best {config.eval_metric} {shown(best[config.eval_metric])} at step {progress['best_step']}")
            say_standing()
            if accelerator.is_main_process:
                log.say(thresholds.compared(thresholds.load(folder / "best" / "thresholds.json")))
        if config.dry_run:
            for text in rehearsal.report(accelerator, folder, root, plan.global_batch):
                log.say(text)
        else:
            log.say(f"done; weights in {folder / ('best' if best else 'last')}")
        stop.clear()
    if profiler:
        profiler.close()
    log.close(**{f"best/{name}": value for name, value in (progress["best"] or {}).items()})
    if ended is Ended.STAGE:
        return stop
    accelerator.end_training()
    return None
