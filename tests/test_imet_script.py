"""`scripts/imet.sh` on a small world: trainings are stood in for (they have tests of their own), every other verb is
real. What is asked of each training; a stopped pipeline goes on; the table says what the files say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlc.data.prediction_files import read_predictions, write_probabilities
from mlc.flags import read_flags
from shards import demo, pack
from shards.dataset import load_dataset, open_index

ROOT = Path(__file__).parents[1]
MLC = f"""#!{sys.executable}
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
if sys.argv[1] == "kfold":
    from test_imet_script import stand_in as main
else:
    from mlc.cli import main
sys.exit(main(sys.argv[1:]))
"""


def stand_in(argv: list[str]) -> int:
    """A `mlc kfold` that writes down its flags, and predictions that are better in every later stage."""
    cut = argv.index("--predict")
    assert argv[cut : cut + 6] == ["--predict", "test", "--weights", "last", "--tta", "hflip"]
    settings = read_flags(argv[1:cut] + argv[cut + 6 :], "mlc kfold")  # refuses a flag that there is not
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(settings) + "\n")
    if settings["experiment"] == os.environ.get("DIES"):
        return 1
    if os.environ.get("SUBMITTED"):
        return 0  # as with --slurm
    dataset = load_dataset(settings["data"][0])
    skill = 0.25 + 0.1 * int(settings["experiment"][0])
    folder = Path(settings["output"]) / f"{settings['experiment']}-kfold"
    truth = {"test": json.loads(Path(os.environ["HIDDEN"]).read_text())}
    for split, name in (("train", "oof"), ("test", "test")):
        index = open_index(dataset, split)
        ids = index.batch.column("image_id").to_pylist()
        target = index.targets(np.arange(len(ids))) if split == "train" else np.array([truth[split][i] for i in ids])
        noise = np.random.default_rng(len(settings["config"][0]) + int(settings["experiment"][0]))
        scores = (1 - skill) * noise.random(target.shape) + skill * target
        write_probabilities(folder / f"{name}.csv", ids, dataset.classes, scores.astype(np.float32))
    return 0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """raw/, data/, hidden.json; imet's groups with a few classes that most images have one of."""
    root = tmp_path_factory.mktemp("imet")
    demo.main([str(root / "raw"), "--samples", "180", "--size", "32", "--workers", "1"])
    flags = ["--csv", str(root / "raw/train.csv"), "--images", str(root / "raw/images"), "--folds", "2", "-j", "1"]
    pack.main([*flags, "--test-csv", str(root / "raw/test.csv"), "--out", str(root / "data")])
    classes = load_dataset(root / "data").classes
    rows = [line.split(",") for line in (root / "raw/test_labels.csv").read_text().split("\n")[1:] if line]
    hidden = {row[0]: [float(name in row[1].split()) for name in classes] for row in rows}
    (root / "hidden.json").write_text(json.dumps(hidden))
    (root / "bin").mkdir()
    (root / "bin" / "mlc").write_text(MLC)
    (root / "bin" / "mlc").chmod(0o755)
    (root / "scripts").mkdir()  # beside no .venv, whose mlc it would take
    for name in ("imet.sh", "imet_table.py"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    return root


def pipeline(world: Path, out: str, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The finished process, and the settings of all trainings so far."""
    env = os.environ | {"PATH": f"{world / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"CALLS": str(world / f"{out}.calls"), "HIDDEN": str(world / "hidden.json"), "OMP_NUM_THREADS": "1"}
    env |= {"DATA": "data", "TRUTH": "raw/test_labels.csv", "GROUP": "digit", "ZOO": "demo-imet demo-imet-csra"}
    command = ["bash", "scripts/imet.sh", out, *flags]
    done = subprocess.run(command, cwd=world, env=env | variables, capture_output=True, text=True)
    calls = world / f"{out}.calls"
    return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture(scope="module")
def finished(world):
    """Stopped in stage 2 by a training that fails, and called again."""
    stopped, calls = pipeline(world, "out", "--lr", "0.5", DIES="2-filter-demo-imet-csra")
    assert stopped.returncode == 1 and not (world / "out" / "2-filter").exists()
    assert [call["experiment"] for call in calls] == [
        "1-zoo-demo-imet",
        "1-zoo-demo-imet-csra",
        "2-filter-demo-imet",
        "2-filter-demo-imet-csra",
    ]
    done, calls = pipeline(world, "out", "--lr", "0.5")
    assert done.returncode == 0, done.stderr
    return done, calls


def test_every_stage_trains_what_the_first_place_did_and_nothing_twice(finished, world):
    _, calls = finished
    stages = ["1-zoo", "2-filter", "3-pseudo", "4-tags-alone"]
    wanted = [f"{stage}-{recipe}" for stage in stages for recipe in ("demo-imet", "demo-imet-csra")]
    wanted.insert(4, "2-filter-demo-imet-csra")  # the one that failed
    assert [call["experiment"] for call in calls] == wanted
    assert all(call["lr"] == (0.001 if call["experiment"][0] == "4" else 0.5) for call in calls)
    own = {call["experiment"]: call for call in calls}
    drop = "out/1-zoo/noise/drop.csv"
    assert "drop_rows" not in own["1-zoo-demo-imet"] and "hard_mining" not in own["1-zoo-demo-imet"]
    assert own["2-filter-demo-imet"]["drop_rows"] == drop and own["2-filter-demo-imet"]["hard_mining"] == 0.05
    third, fourth = own["3-pseudo-demo-imet"], own["4-tags-alone-demo-imet-csra"]
    assert third["data"] == ["data", "pseudo:out/2-filter/test.pseudo.arrow"] and third["drop_rows"] == drop
    assert fourth["groups"] == ["digit"] and fourth["group_loss"] == {"digit": "bce"} and not fourth["pretrained"]
    assert fourth["pretrained_path"] == "out/3-pseudo-demo-imet-csra-fold{fold}/last"
    assert (world / drop).read_text().startswith("ImageID")


def test_the_joined_answers_are_means_and_the_table_has_their_scores(finished, world):
    done, _ = finished
    out = world / "out"
    classes = load_dataset(world / "data").classes
    parts = [
        read_predictions(out / f"1-zoo-{name}-kfold" / "oof.csv", classes)[1]
        for name in ("demo-imet", "demo-imet-csra")
    ]
    np.testing.assert_allclose(read_predictions(out / "1-zoo" / "oof.csv", classes)[1], np.mean(parts, 0), atol=1e-6)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["1-zoo", "2-filter", "3-pseudo", "4-tags", "5-stack"]
    for stage, honest, test, *_ in rows:
        assert float(honest) == pytest.approx(
            json.loads((out / stage / "thresholds.json").read_text())["honest"], abs=1e-4
        )
        assert float(test) == pytest.approx(
            json.loads((out / stage / "scores.json").read_text())["f2_samples"], abs=1e-4
        )
    assert float(rows[2][2]) > float(rows[0][2])  # the stand-in gets better, and so does what is made of it
    assert (
        len((out / "test-submission.csv").read_text().splitlines())
        == len(open_index(load_dataset(world / "data"), "test")) + 1
    )


def test_a_finished_pipeline_runs_nothing_again(finished, world):
    before = {path: path.stat().st_mtime_ns for path in (world / "out").rglob("*") if path.is_file()}
    done, calls = pipeline(world, "out", "--lr", "0.5")
    assert done.returncode == 0 and len(calls) == len(finished[1])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [line for line in done.stdout.splitlines() if line.startswith("$")]


def test_a_stage_that_was_submitted_ends_the_call(world):
    done, calls = pipeline(world, "later", SUBMITTED="yes")
    assert done.returncode == 0 and "stage 1-zoo is submitted; the same command goes on" in done.stderr
    assert [call["experiment"] for call in calls] == ["1-zoo-demo-imet", "1-zoo-demo-imet-csra"]


@pytest.mark.parametrize(
    "out, variables, words",
    [
        ("", {}, "usage: scripts/imet.sh"),
        ("--lr", {}, "the first argument"),
        ("o", {"ZOO": "demo"}, "name at least two"),
    ],
)
def test_mistakes_are_told_before_anything_runs(world, out, variables, words):
    done, calls = pipeline(world, out, **variables)
    assert done.returncode == 2 and words in done.stderr and not calls
