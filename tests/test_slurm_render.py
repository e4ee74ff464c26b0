"""`mlc slurm` without a Slurm: the file it renders is the shipped one with other options, and does what it says."""

import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from mlc import slurm
from shards.console import UserError
from shards.console import run as run_verb

ARGS = ["-c", "demo", "--data", "d", "--output", "out", "--experiment", "e"]


def rendered(capsys, *argv: str) -> str:
    assert slurm.main([*argv, "--dry-run", "--", *ARGS]) == 0
    return capsys.readouterr().out


def options(script: str) -> dict[str, str]:
    """`#SBATCH --name=value`, as sbatch reads them: until the first command."""
    found = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE)
    assert len(found) == len(dict(found)), "an option twice"
    return {name: value.strip('"') for name, value in found}


def commands(script: str) -> list[str]:
    return [line for line in script.splitlines() if line and not line.startswith("#")]


def test_options_replace_the_shipped_ones_and_the_rest_stays(capsys):
    script = rendered(capsys, "train", "--nodes", "2", "--gpus", "4", "--time", "4:00:00", "--partition", "p")
    shipped = (ROOT / "slurm" / "train.sbatch").read_text()
    wanted = {"nodes": "2", "gpus-per-node": "4", "time": "4:00:00", "partition": "p", "job-name": "e"}
    wanted |= {"output": "out/e/slurm-%j.out", "chdir": str(Path.cwd())}
    assert options(script) == options(shipped) | wanted
    assert commands(script)[2:] == commands(shipped)
    assert commands(script)[1] == f'set -- {shlex.join(ARGS)} "$@"'


def test_slurm_warns_a_short_job_later(capsys):
    for time, signal in {"4:00:00": 300, "19": 285, "8:00": 120, "0:10:00": 150, "1-0": 300, "0-0:12": 180}.items():
        assert options(rendered(capsys, "train", "--time", time))["signal"] == f"B:USR1@{signal}", time


def test_no_gpus_asks_for_none(capsys):
    assert "gpus-per-node" not in options(rendered(capsys, "train", "--gpus", "0"))


def test_any_option_of_sbatch(capsys):
    found = options(rendered(capsys, "train", "--sbatch=--qos=high", "--sbatch", "exclusive", "--mem", "8G"))
    assert (found["qos"], found["exclusive"], found["mem"]) == ("high", "", "8G")


def test_kfold_is_one_file_with_the_training_in_it(capsys):
    script = rendered(capsys, "kfold", "--folds", "3")
    assert options(script)["array"] == "0-2" and options(script)["output"].endswith("e-kfold/slurm-%A_%a.out")
    assert "source slurm" not in script
    assert commands(script)[-1] == 'exit "$code"'
    assert commands(script).index("MLC_FOLD=$SLURM_ARRAY_TASK_ID") < commands(script).index("again=")


def test_predict_names_the_run(capsys):
    argv = ["predict", "--dry-run", "--local", "/scratch/a b", "--", "--run", "runs/r", "--data", "d"]
    assert slurm.main(argv) == 0
    script = capsys.readouterr().out
    assert options(script)["job-name"] == "r" and "export MLC_LOCAL='/scratch/a b'" in script
    assert "mlc predict" in script and "scontrol requeue" not in script


def test_arguments_arrive_as_they_were_given(tmp_path, capsys):
    """Quotes, blanks and dollars: the shell of the job sees what the user's shell passed on."""
    given = ["--where", 'n_labels > 1 and "cat dog" in labels', "--experiment", "a $HOME 'b'", "--data", "x\ny"]
    script = slurm.render("train", {}, {}, given)
    line = script[script.index("set -- ") : script.index('"$@"') + len('"$@"')]
    said = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\0" "$@"', "bash", "more"], capture_output=True, text=True
    )
    assert said.stdout.split("\0")[:-1] == [*given, "more"]


@pytest.mark.parametrize("job", slurm.JOBS)
def test_the_shell_reads_every_file(job):
    for text in ((ROOT / "slurm" / f"{job}.sbatch").read_text(), slurm.render(job, {}, {}, ["--data", "d"])):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def fake_sbatch(folder: Path, monkeypatch, body: str) -> None:
    file = folder / "sbatch"
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_submits_what_it_wrote_into_the_runs_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake_sbatch(tmp_path, monkeypatch, 'cat "$1" > seen; echo Submitted batch job 7')
    assert slurm.main(["train", "--launch", str(ROOT / "accelerate_config.yaml"), "--", *ARGS]) == 0
    assert (tmp_path / "seen").read_text() == (tmp_path / "out" / "e" / "train.sbatch").read_text()
    assert "Submitted batch job 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["train", "--", *ARGS], "no sbatch on this machine; call this on a login node, or --dry-run"),
        (["train", "--node", "2", "--", *ARGS], "unknown argument --node; did you mean --nodes?"),
        (["train", "--data", "d"], "unknown argument --data"),
        (["train"], "they come after ` -- `"),
        (["train", "--nodes", "two", "--", *ARGS], "expected a whole number, not 'two'"),
        (["train", "--dry-run", "--", "--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
        (["train", "--dry-run", "--launch", "gpu99", "--", *ARGS], "--launch gpu99: neither a file nor"),
        (["train", "--dry-run", "--folds", "5", "--", *ARGS], "--folds is not train's; mlc slurm kfold --folds 5"),
        (["predict", "--dry-run", "--", "--run", "r", "--tat", "x"], "unknown argument --tat"),
        (["train", "--dry-run", "--sbatch", 'comment="x"', "--", *ARGS], "--comment cannot hold a quote"),
        (["fly", "--", *ARGS], "invalid choice: 'fly'"),
    ],
)
def test_a_mistake_is_one_line(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    try:
        code = run_verb(slurm.main, argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and len(error.splitlines()) == 1, error


def test_sbatchs_refusal_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: p' >&2; exit 1")
    with pytest.raises(UserError, match=r"refused .*train.sbatch: invalid partition specified: p"):
        slurm.main(["train", "--partition", "p", "--launch", str(ROOT / "accelerate_config.yaml"), "--", *ARGS])
