"""The scripts whose numbers stand in the documents: their formulas against closed forms, and that they run at all."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, environment

sys.path.append(str(ROOT / "benchmarks"))
import gpu_results
import memory
import predict
import scaling
import train_e2e

SMALL = ["--quick", "--model", "test_vit", "--amp", "none"]


def table_of(printed):
    """The cells of the last table, a list a row."""
    lines = printed.split("\n\n")[-1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def call(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    return module.main()


LIBRARIES = ("common", "peer_loop", "real_sides")
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in LIBRARIES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_its_help(script, monkeypatch, capsys):
    """It takes the imports of all, whose parts move."""
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)  # a name that no test file has
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, module, "--help")
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_the_memory_of_each_way_is_counted(monkeypatch, tmp_path, capsys):
    call(monkeypatch, memory, "--models", "test_vit", "--device", "cpu", "--json", tmp_path / "memory.json")
    table = {row[0].split(", ", 1)[1]: row for row in table_of(capsys.readouterr().out)[2:]}
    assert list(table) == list(memory.WAYS) and table["fast, compiled"][1] == "-"
    assert float(table["fast, all"][1]) < float(table["fast, attention"][1]) < float(table["fast"][1])
    assert float(table["fast"][5]) == 1 < float(table["fast, every:2"][5]) < float(table["fast, all"][5])
    assert [r["way"] for r in json.loads((tmp_path / "memory.json").read_text())["results"]] == list(memory.WAYS)


# ---- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpus, expected",
    [
        (1, 0.0),
        (2, 1.0 + 2 * 4e-3),  # 100 MiB in 4 buckets; two hops each
        (8, 2 * 7 / 8 + 4 * 14 * 1e-3),
        (16, 2 * 15 / 16 / 0.25 + 4 * 16 * 1e-3),  # the nodes' network, a quarter as fast; two hops more
        (64, 2 * 63 / 64 / 0.25 + 4 * 20 * 1e-3),
        (60, 2 * 59 / 60 / 0.25 + 4 * 20 * 1e-3),  # the last node is not full
    ],
)
def test_seconds_of_a_ring_all_reduce(gpus, expected):
    size = 4 * scaling.BUCKET
    found = scaling.all_reduce_seconds(size, gpus, link=size, network=size / 4, latency=1e-3)
    assert found == pytest.approx(expected)


def test_a_step_waits_for_what_its_backward_pass_cannot_hide():
    def efficiency(reduction, accumulation=1):
        return 3 * accumulation / scaling.step_seconds(3.0, reduction, overlap=0.5, accumulation=accumulation)

    assert efficiency(0.9) == efficiency(1.0) == 1  # two of three seconds are the backward pass, half of it hides
    assert efficiency(2.0) == 3 / 4
    assert efficiency(2.0, accumulation=4) == 12 / 13


def test_the_prediction_alone(monkeypatch, capsys):
    more = ["--predict-model", "test_vit", "--gpus", 8, 64, "--network", 200, "--rate", 100]
    assert call(monkeypatch, scaling, "--predict", *more) == 0
    rows = table_of(capsys.readouterr().out)
    assert [row[:2] for row in rows[2:]] == [["200 Gb/s", "8"], ["200 Gb/s", "64"]]
    assert rows[2][3:5] == ["800", "100.0%"]  # so small a model that all is hidden


def test_the_overlap_of_a_reduction():
    alone = {"step": 1.0, "with": 0.9, "without": 0.9, "parameters": 1}
    two = {"step": 1.25, "with": 1.0, "without": 0.9, "bare": 0.4, "parameters": 1}
    found = {"ddp, 1": [alone], "ddp, 2": [two], "ddp, 4": [two]}
    rows = scaling.measured_rows(found, batch=10, cores=2)
    assert rows[1] == ["ddp", "2", "8.00", "0%", "80%", "80%", "900", "100", "400", "75%"]
    assert rows[2] == ["ddp", "4", "8.00", "0%", "80%", "160%", "900", "100", "400", ""]
    assert rows[0][2:6] == ["10.00", "0%", "100%", "100%"]


@pytest.mark.distributed
def test_worlds_are_measured():
    options = Namespace(model="test_vit", img_size=64, batch_size=2, iterations=1, attention="fast", amp="none")
    options.device = "cpu"
    for name in ("ddp", "fsdp2"):
        found = scaling.turn(2, options, name)
        assert found.keys() == {"step", "with", "without", "bare", "parameters"}
        assert all(value > 0 for value in found.values())


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_what_a_run_kept():
    def line(step, clock, waited, **more):
        return {"step": step, "samples_seen": 8 * step, "clock": clock, "data/wait_frac": waited, **more}

    lines = [line(1, 0.0, 0.9), line(2, 5.0, 0.8), line(4, 7.0, 0.5), line(6, 10.0, 0.1)]
    lines.append(line(8, 16.5, 0.0, **{"ckpt/blocked_s": 1.5}))
    found = train_e2e.kept(lines, 2)
    times = {"costs": 4.0, "blocked": 1.5, "writing": 0.0}
    assert found == {"rate": 16 / 2.5, "with": 48 / 11.5, "waiting": pytest.approx(0.3), **times}


def test_the_shares_that_runs_kept():
    run = {"rate": 9.0, "with": 6.0, "waiting": 0.02, "costs": 120.0, "blocked": 2.0, "writing": 100.0}
    rows = train_e2e.rows({"bare step": [{"rate": 10.0}], "run": [run]})
    assert rows[1] == ["run", "9.00", "0%", "90.0%", "60.0%", "75.0%", "2.0%", "120.00", "2.00"]


def test_whole_runs_are_measured(monkeypatch, capsys, tmp_path):
    more = ["--samples", 30, "--workers", 0, "--json", tmp_path / "found.json"]
    assert call(monkeypatch, train_e2e, *SMALL, "--device", "cpu", *more) == 0
    rows = table_of(capsys.readouterr().out)
    assert [row[0] for row in rows[2:]] == ["bare step", "run, 0 workers"]
    run = json.loads((tmp_path / "found.json").read_text())["results"]["run, 0 workers"][0]
    assert run["rate"] > 0 and run["with"] > 0 and run["blocked"] > 0 and 0 < run["waiting"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take the GPU, where --quick is not as small")
def test_predictions_are_measured(monkeypatch, capsys, tmp_path):
    more = ["--batches", 3, "--workers", 0, "--json", tmp_path / "found.json"]
    assert call(monkeypatch, predict, *SMALL, *more) == 0
    rows = table_of(capsys.readouterr().out)
    assert [row[:2] for row in rows[2:]] == [["hflip,scale (4)", "bare"], ["hflip,scale (4)", "predict"]]
    found = json.loads((tmp_path / "found.json").read_text())["results"]["hflip,scale (4): predict"][0]
    assert found["rate"] > 0 and found["with start"] > 0


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def test_parts_are_merged_with_what_became_of_them(tmp_path):
    for number, (name, ended) in enumerate([("step", "0 41"), ("memory", "1 2"), ("predict", "124 60")]):
        (tmp_path / f"{name}.ended").write_text(ended)
        os.utime(tmp_path / f"{name}.ended", (number, number))
        (tmp_path / f"{name}.log").write_text("x" * 5000 + "the end")
    (tmp_path / "step.json").write_text('{"results": [1]}')
    parts = gpu_results.merged(tmp_path)
    assert [*parts] == ["step", "memory", "predict"]
    assert parts["step"] == {"ended": "well", "seconds": 41, "results": {"results": [1]}}
    assert parts["memory"]["ended"] == "failed with exit code 1" and parts["memory"]["said"].endswith("the end")
    assert len(parts["predict"]["said"]) == gpu_results.SAID and parts["predict"]["ended"] == "out of time"


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment() | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("benchmarks/gpu.sh: there is no GPU") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
