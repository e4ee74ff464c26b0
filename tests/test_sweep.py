"""`mlc sweep`: what a file means, what runs and in which order, and the numbers it ends in."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from scipy import stats

from mlc import jobs, slurm, sweep
from mlc.config import Config
from mlc.flags import write_yaml
from mlc.report import sweep as report
from mlc.sweeps import packaged, read
from shards import owner
from shards.console import run as run_verb

TINY = {
    "model": "swinv2_tiny_window8_256",
    "img_size": 32,
    "model_kwargs": {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "batch_size": 8,
    "workers": 0,
    "max_steps": 3,
    "eval_every": "2st",
}


def sweep_file(folder: Path, **content) -> str:
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"seeds": [1, 2], "base": TINY, **content}, sort_keys=False))
    return str(path)


def table_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def processes_of(folder: Path) -> int:
    return len((folder / "seconds").read_text().split())


# ---- real trainings --------------------------------------------------------------------------------------------------


def test_one_variant_trains_the_other_fails_and_the_next_call_tries_that_alone(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    variants = {"plain": {}, "broken": {"pretrained_path": "nowhere.pth"}, "late": {"kd_teacher": "{broken}"}}
    file, out = sweep_file(tmp_path, metric="map", variants=variants), tmp_path / "out"
    argv = [file, "--data", str(shards), "--out", str(out), "--jobs", "2"]
    assert sweep.main(argv) == 1
    said = capfd.readouterr()
    assert f"{out / 'broken-s2'}: failed (2): error: --pretrained-path nowhere.pth: no such file" in said.err
    assert f"{out / 'late-s1'}: not run, since broken-s1 is not finished" in said.err
    states = {(row["variant"], row["seed"]): row["state"] for row in table_of(out)}
    assert states == {(v, s): "finished" if v == "plain" else "unfinished" for v in variants for s in ("1", "2")}
    row = table_of(out)[1]
    printed = (out / "plain-s2" / "output.log").read_text()
    assert f"best map {float(row['map']):.4f} at step {row['step']}" in printed
    weights = out / "plain-s2" / "best" / "model.safetensors"
    assert float(row["mb"]) == round(weights.stat().st_size / 1e6, 2) and float(row["minutes"]) > 0

    assert sweep.main([*argv, "--only", "plain"]) == 0
    assert sweep.main([*argv, "--seeds", "1"]) == 1
    assert [processes_of(out / name) for name in ("plain-s1", "plain-s2", "broken-s1")] == [1, 1, 2]
    with pytest.raises(sweep.UserError, match=r"plain-s1 was trained with lr auto, and now it is 0.3; delete"):
        sweep.main([*argv, "--lr", "0.3"])


# ---- processes -------------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from pathlib import Path
folder, how = Path(sys.argv[1]), sys.argv[2]
print(os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
(folder / "begun").write_text(str(time.monotonic()))
while how == "wait" and not (folder / "STOP").exists():
    time.sleep(0.02)
print("stopped at step 3" if how == "wait" else "done; weights in best")
"""


def child(folder: Path, how: str) -> list[str]:
    return [sys.executable, "-S", "-c", CHILD, str(folder), how]


def folders(tmp_path: Path, count: int) -> list[Path]:
    made = [tmp_path / f"run{number}" for number in range(count)]
    for folder in made:
        folder.mkdir()
    return made


def test_each_process_has_its_share_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "command", lambda folder, launch_file: child(folder, "run"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    made = folders(tmp_path, 2)
    kept = {"launch_file": None, "gpus": ["3", "5"], "say": lambda text: None}
    assert jobs.work([jobs.Job(folder) for folder in made], at_once=2, **kept) == {}
    assert [(folder / "output.log").read_text().splitlines()[0] for folder in made] == ["3 3", "3 5"]


def test_a_run_waits_for_the_one_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "command", lambda folder, launch_file: child(folder, "run"))
    teacher, student, alone = folders(tmp_path, 3)
    kept = {"at_once": 2, "launch_file": None, "gpus": [], "say": lambda text: None}
    assert jobs.work([jobs.Job(student, (teacher,)), jobs.Job(teacher)], **kept) == {}
    assert jobs.work([jobs.Job(alone, (teacher,))], **kept) == {}  # as `--task K` does
    begun = [float((folder / "begun").read_text()) for folder in (teacher, student)]
    assert begun[1] > begun[0] + jobs.seconds(teacher) - 0.2


@pytest.mark.parametrize("lock", [jobs.LOCK, owner.RUN_LOCK], ids=["another sweep", "a training whose sweep is gone"])
def test_two_sweeps_do_not_train_the_same_run(lock, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "command", lambda folder, launch_file: child(folder, "run"))
    mine, theirs, after = folders(tmp_path, 3)
    given = [jobs.Job(theirs), jobs.Job(after, (theirs,)), jobs.Job(mine)]
    with owner.owned(theirs / lock):
        left = jobs.work(given, at_once=1, launch_file=None, gpus=[], say=lambda text: None)
    assert {folder.name: reason[:7] for folder, reason in left.items()} == {
        theirs.name: "left to",
        after.name: "not run",
    }
    assert jobs.finished(mine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_the_sweep_lets_its_runs_save(number, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "command", lambda folder, launch_file: child(folder, "wait"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    made = folders(tmp_path, 3)

    def interrupt() -> None:
        while sum((folder / "begun").exists() for folder in made) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        jobs.work(list(map(jobs.Job, made)), at_once=2, launch_file=None, gpus=[], say=lambda text: None)
    ended = [(folder / "output.log").read_text().endswith("stopped at step 3\n") for folder in made[:2]]
    assert ended == [True, True] and not (made[2] / "output.log").exists()
    assert not any(map(jobs.finished, made))


# ---- the file --------------------------------------------------------------------------------------------------------


def test_settings_of_a_run_and_who_wins(tmp_path):
    base = {"config": "demo", "epochs": 3, "lr": 1e-2}
    variants = {"student": {"kd_teacher": "{teacher}", "batch_size": 4}, "teacher": {"lr": 2e-2}}
    file = sweep_file(tmp_path, base=base, metric=["map", "f1_samples"], variants=variants)
    found = read(file, given={"epochs": 2.0, "data": ["d"]}, out=str(tmp_path / "o"))
    assert [run.name for run in found.runs] == ["teacher-s1", "student-s1", "teacher-s2", "student-s2"]
    config = found.runs[3].config
    assert config.kd_teacher == [str(tmp_path / "o" / "teacher-s2")] and found.runs[3].needs == ("teacher-s2",)
    assert (config.seed, config.epochs, config.lr, config.batch_size, config.data) == (2, 2, 0.01, 4, ["d"])
    assert (config.img_size, config.eval_metric, config.resume) == (48, "map", "auto")
    assert found.runs[0].config.lr == 0.02 and found.baseline == "student"
    assert [run.name for run in sweep._chosen(found, ["student"])] == [run.name for run in found.runs]
    assert [run.name for run in sweep._chosen(found, ["teacher"])] == ["teacher-s1", "teacher-s2"]
    other = read(file, given={"config": []} | {"lr": 0.5}, seeds=[9], quick=True)
    assert [run.config.max_steps for run in other.runs] == [4, 4] and str(other.out) == "runs/s/quick"


def test_a_grid_is_every_combination_and_each_goes_one_at_a_time(tmp_path):
    values = {"lr": ["1e-4", 3e-4], "batch_size": [32, 64]}
    names = [v.name for v in read(sweep_file(tmp_path, base={}, grid=values), given={}).variants]
    assert names == [f"lr={lr},batch_size={b}" for lr in ("0.0001", "0.0003") for b in (32, 64)]
    variants = read(sweep_file(tmp_path, base={}, each=values), given={"lr": 2e-4}).variants
    assert [v.name for v in variants] == ["base", "lr=0.0001", "lr=0.0003", "batch_size=64"]  # 32 is the base's
    assert variants[3].changes == {"batch_size": 64}


@pytest.mark.parametrize("name", [name for name, _ in packaged()])
def test_packaged_sweeps_can_be_read(name):
    found = read(name, given={"data": ["d"]})
    assert len(found.seeds) == 3 and len({run.name for run in found.runs}) == len(found.runs)


def test_help_lists_the_packaged_sweeps(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name, _ in packaged()) and "--lr" not in said


@pytest.mark.parametrize(
    "content, more, said",
    [
        ({"variants": {"a": {"mixupp": 1}}}, [], "variant a: unknown setting 'mixupp'; did you mean mixup?"),
        ({"variants": {"a": {}, "b": {"lr": -1}}}, [], "variant b: --lr must be above 0"),
        ({"variants": {"a": {"lr": "fast"}}}, [], "variant a: lr: expected a number"),
        ({"variants": {"a": {"kd_teacher": "{bb}"}, "b": {}}}, [], "there is no variant 'bb'; did you mean b?"),
        ({"variants": {"a": {"kd_teacher": "{b}"}, "b": {"kd_teacher": "{a}"}}}, [], "wait for one another"),
        ({"variants": {"a": {}}, "grid": {}}, [], "give one of `variants:`, `grid:` and `each:`"),
        ({"variants": {"a/b": {}}}, [], "variant a/b: a name is made of"),
        ({"variants": {"a": {"seed": 4}}}, [], "variant a: --seed is set by the sweep itself; give `seeds:`"),
        ({"variants": {}}, [], "variants: is empty"),
        ({"variants": ["a"]}, [], "variants: expected `name: value` lines, found a list"),
        ({"variant": {"a": {}}}, [], "unknown key 'variant'; did you mean variants?"),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, [], "expected different whole numbers"),
        ({"variants": {"a": {}}, "baseline": "plain"}, [], "baseline: there is no variant 'plain'"),
        ({"grid": {"lr": [1e-3, "0.001"]}}, [], "lr=0.001 comes twice"),
        ({"variants": {"a": {}}, "base": {"config": "demmo"}}, [], "neither a file nor a recipe; did you mean demo?"),
        ({"variants": {"a": {}}, "metric": "f1"}, [], "variant a: --eval-metric f1 is not measured"),
        ({"variants": {"a": {}, "b": {"warmup": "3x"}}}, [], "variant b: --warmup: '3x' is no duration"),
        ({"variants": {"a": {}}}, ["--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
        ({"variants": {"a": {}}}, ["--only", "b"], "--only b: no variant"),
        ({"variants": {"a": {}}}, ["--resume", "auto"], "--resume is set by the sweep itself"),
        ({"variants": {"a": {}}}, ["--task", "7"], "the sweep has the runs 0 to 1"),
        ({"variants": {"a": {}}}, ["--jobs", "0"], "expected a whole number above 0"),
        ({"variants": {"a": {}}}, ["--val-split", ""], "give --val-split or --fold"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(content, more, said, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "work", None)
    file = sweep_file(tmp_path, **{"base": TINY, **content})
    try:
        code = run_verb(sweep.main, [file, "--data", str(shards), "--out", str(tmp_path / "out"), *more])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_an_unknown_sweep_names_the_nearest(capsys):
    assert run_verb(sweep.main, ["ablation"]) == 2
    assert "did you mean ablations?" in capsys.readouterr().err


# ---- the result ------------------------------------------------------------------------------------------------------


def finished_run(run, values: list[dict[str, float]], seconds: str = "60\n30\n") -> None:
    """A run as training leaves it, with these evaluations."""
    (run.folder / "best").mkdir(parents=True)
    (run.folder / "best" / "model.safetensors").write_bytes(bytes(1_500_000))
    (run.folder / "output.log").write_text("step 1\ndone; weights in best\n")
    (run.folder / "seconds").write_text(seconds)
    write_yaml(run.config, run.folder / "args.yaml")
    lines = [{"step": step, "samples_seen": 8 * step, "epoch": 1, **found} for step, found in enumerate(values, 1)]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_means_spread_and_paired_differences(tmp_path, capsys):
    content = {"seeds": [1, 2, 3, 4], "metric": ["map", "loss"], "variants": {"plain": {}, "mixup": {"mixup": 0.4}}}
    found = read(sweep_file(tmp_path, **content), given={}, out=str(tmp_path / "o"))
    values = {"plain": [0.50, 0.60, 0.55], "mixup": [0.53, 0.59, 0.60, 0.70]}
    for run in found.runs:
        if run.seed <= len(values[run.variant]):
            finished_run(run, [{"val/map": values[run.variant][run.seed - 1], "val/loss": 0.1}])
    table = report.rows(found)
    assert [row["state"] for row in table].count("unfinished") == 1
    mixup, plain = report.lines(found, table)  # the better one first
    gain = np.array(values["mixup"][:3]) - np.array(values["plain"])
    assert list(mixup.gain.values()) == pytest.approx(gain) and not plain.gain
    cells = list(report._cells(mixup, found.metrics))
    expected = f"{gain.mean():+.4f} ± {stats.sem(gain):.4f}"
    deviation = f"{np.std(values['mixup'], ddof=1):.4f}"
    assert cells == ["mixup", "4", "0.6050", deviation, "0.5300..0.7000", expected, "2/3", "0.1000", "1.5", "1.5"]
    assert sweep._report(found) == 0
    assert "Not finished, and in no mean: plain-s4" in (tmp_path / "o" / "summary.md").read_text()
    assert expected in (tmp_path / "o" / "summary.md").read_text() and expected in capsys.readouterr().out


def test_one_seed_has_no_spread_and_a_lower_loss_wins(tmp_path):
    content = {"metric": "loss", "variants": {"plain": {}, "mixup": {}}}
    found = read(sweep_file(tmp_path, **content), given={}, seeds=[5], out=str(tmp_path / "o"))
    for run, loss in zip(found.runs, (0.5, 0.4), strict=True):
        finished_run(run, [{"val/loss": loss}])
    best, _ = report.lines(found, report.rows(found))
    assert list(report._cells(best, ["loss"]))[:7] == ["mixup", "1", "0.4000", "", "", "+0.1000", "1/1"]


def test_the_best_evaluation_is_the_earliest_of_the_best(tmp_path):
    log = tmp_path / "log.jsonl"
    values = [(1, 0.3, 0.2), (2, 0.5, 0.5), (3, 0.4, 0.5)]
    text = "".join(json.dumps({"step": s, "val/map": a, "val_ema/map": b}) + "\n" for s, a, b in values)
    log.write_text(text + '{"step": 4, "train/loss": 1.0}\n')
    assert report.best_evaluation(log, "map") == {"step": 2, "weights": "val", "map": 0.5}


MLP = {"head": "mlp", "head_kwargs": {"hidden": 8}}


@pytest.mark.parametrize(
    "content, scales, of_the_base",
    [
        ({"variants": {"plain": {}, "mixup": {"mixup": 0.4}}}, ["linear"], 0),
        ({"each": {"loss": ["focal"]}}, ["linear"], 0),
        (
            {"base": TINY | {"lr": 1e-4}, "each": {"lr": [1e-4, 1e-3], "batch_size": [4, 16], "smoothing": [0.1]}},
            ["log", "linear", "linear"],
            2,
        ),
        ({"base": MLP, "each": {"head_kwargs": [{"hidden": 8}, {"hidden": 16}]}}, ["linear"], 0),
    ],
)
def test_the_plot_has_a_dot_per_run(content, scales, of_the_base, tmp_path, monkeypatch):
    found = read(sweep_file(tmp_path, metric="map", **content), given={}, out=str(tmp_path / "o"))
    for number, run in enumerate(found.runs):
        finished_run(run, [{"val/map": 0.5 + number / 100}])
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **how: drawn.append(self))
    monkeypatch.setattr(Path, "replace", lambda self, path: None)
    report.plot(tmp_path / "plot.png", found, report.lines(found, report.rows(found)))
    axes = drawn[0].axes
    dots = [len(line.get_xdata()) for axis in axes for line in axis.lines if line.get_marker() == "o"]
    assert [axis.get_xscale() for axis in axes] == scales
    assert sum(dots) == len(found.runs) + of_the_base * len(found.seeds)  # which is in each of the panels


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def submitted(tmp_path: Path, shards: Path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/bash\ncat "$1" >>seen; echo Submitted batch job 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    file = sweep_file(tmp_path, variants={"teacher": {}, "plain": {}, "kd": {"kd_teacher": "{teacher}"}})
    launch = ROOT / "accelerate_config.yaml"
    argv = [file, "--data", str(shards), "--out", "o", "--jobs", "3", "--launch", str(launch)]
    assert sweep.main([*argv, "--slurm=--gpus 2 --time 4:00:00"]) == 0
    return ["#!/bin/bash" + text for text in (tmp_path / "seen").read_text().split("#!/bin/bash")[1:]]


def test_an_array_of_runs_and_one_of_those_that_need_them(shards, tmp_path, monkeypatch):
    from test_slurm_render import commands, options

    first, second = submitted(tmp_path, shards, monkeypatch)
    assert options(first)["array"] == "0-3%3" and options(second)["array"] == "0-1%3"
    assert options(second)["dependency"] == "afterany:7" and "dependency" not in options(first)
    assert options(first)["gpus-per-node"] == "2" and options(first)["output"] == "o/slurm-%A_%a.out"
    names = [Path(word).name for word in commands(second)[1].split() if "-s" in word]
    assert names == ["kd-s1", "kd-s2"]
    assert Config(**yaml.safe_load((tmp_path / "o" / "kd-s2" / "settings.yaml").read_text())).kd_teacher


def test_a_task_trains_in_its_folder_and_says_how_long(shards, tmp_path, monkeypatch):
    script = submitted(tmp_path, shards, monkeypatch)[0]
    for name, body in {"mlc": '[ "$2" = resume ] && echo auto || echo o/x', "srun": 'echo "srun ${@: -4}"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9", "SLURM_NNODES": "1", "SLURM_JOB_END_TIME": "1"}
    done = subprocess.run(["bash"], input=script, text=True, env=env, capture_output=True)
    folder = (tmp_path / "o" / "teacher-s2").resolve()
    assert done.returncode == 0 and done.stdout == ""
    assert (folder / "output.log").read_text() == f"srun -c {folder}/settings.yaml --resume auto\n"
    assert jobs.seconds(folder) < 60 and processes_of(folder) == 1


def test_the_shipped_file_is_what_the_shell_can_read():
    assert subprocess.run(["bash", "-n"], input=slurm.render("sweep", {}, {}, ["a b"]), text=True).returncode == 0


def test_a_metric_without_a_value_is_a_dash_and_comes_last(tmp_path, capsys):
    """What a log has as null where no validation sample has a label; an old one has a NaN."""
    content = {"metric": ["map", "loss"], "variants": {"none": {}, "plain": {}}}
    found = read(sweep_file(tmp_path, **content), given={}, seeds=[5], out=str(tmp_path / "o"))
    for run, value in zip(found.runs, (float("nan"), 0.4), strict=True):
        finished_run(run, [{"val/map": value, "val/loss": 0.1}])
    best, worst = report.lines(found, report.rows(found))
    assert (best.variant, list(report._cells(worst, ["map"]))[:3]) == ("plain", ["none", "0", "-"])
    assert sweep._report(found) == 0
    text = (tmp_path / "o" / "summary.md").read_text() + capsys.readouterr().out
    assert "| none | 0 | - |" in text and "nan" not in text


def test_each_metric_of_the_table_must_be_a_score(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "work", None)
    file = sweep_file(tmp_path, base=TINY, variants={"a": {}}, metric=["map", "threshold"])
    assert run_verb(sweep.main, [file, "--data", str(shards), "--out", str(tmp_path / "out")]) == 2
    assert "metric: threshold is a setting and no score; choose one of loss, map," in capsys.readouterr().err
