"""What a run may start from, without running one."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from mlc import resume
from mlc.config import Config
from mlc.parallel import storage
from mlc.resume import Start
from shards.console import UserError

CLASSES = ["cat", "dog", "owl"]
DATA = {"data set": "aaa", "samples": "bbb"}
FACTS = {"global_batch": 32, "world_size": 2, "versions": {"torch": "2.12"}}


def meta(**more) -> dict:
    return json.loads(
        json.dumps(
            {
                "progress": {"step": 5, "bad": {"x": "torn"}},
                "config": vars(Config(data=["old"])),
                "classes": CLASSES,
                "data": DATA,
                **FACTS,
                **more,
            }
        )
    )


def compared(**settings) -> list[str]:
    return compared_start(**settings).notices


def compared_start(*, weights_only=False, data=DATA, classes=CLASSES, facts=FACTS, saved=None, **settings) -> Start:
    place = Path("runs/x/checkpoints/step-00000005")
    start = Start(place, weights_only=weights_only, meta=saved or meta())
    resume.compare(start, Config(**{"data": ["new"]} | settings), data=data, classes=classes, facts=facts)
    return start


def test_the_same_settings_say_nothing():
    assert compared(workers=9, output="elsewhere", log_interval=3, checkpoint_every="5min") == []


def test_what_may_change_is_one_line():
    facts = {"global_batch": 64, "world_size": 1, "versions": {"torch": "2.15"}}
    (line,) = compared(lr=0.5, scale=(0.5, 1.0), mixup_off="3ep", facts=facts)
    assert line.startswith("changed since the checkpoint: ")
    for change in ("lr auto -> 0.5", "scale 0.7 1.0 -> 0.5 1.0", "mixup-off '' -> 3ep", "global batch 32 -> 64"):
        assert change in line
    assert "world size 2 -> 1" in line and "2.15" in line and "\n" not in line


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"seed": 7}, "another seed: 42 then, 7 now; use the same one.*--resume-weights-only"),
        ({"img_size": 192}, "another img_size: 256 then, 192 now.*--resume-weights-only"),
        ({"model_ema": False}, "another model_ema: True then, False now.*--resume-weights-only"),
        ({"model": "resnet18"}, "another model: swinv2.* then, resnet18 now.*--pretrained-path"),
        ({"head": "extra_linear"}, "another head: linear then, extra_linear now.*--pretrained-path"),
        ({"model_kwargs": {"embed_dim": 8}}, "another model_kwargs: {} then, .*embed_dim"),
        (
            {"identity": {"data set": "zzz", "samples": "bbb"}},
            "data set: aaa then, zzz now .--data old then, new now.*--allow-data-change",
        ),
        (
            {"identity": {"data set": "aaa", "samples": "yyy"}},
            "another samples: bbb then, yyy now.*--allow-data-change",
        ),
        ({"classes": ["cat", "dog", "fox"]}, "3 then, 3 now .*'owl' only then, 'fox' only now.*--pretrained-path"),
        ({"classes": CLASSES[::-1]}, "the same names in another order"),
    ],
)
def test_what_may_not_change_names_both_values_and_the_way_out(settings, words):
    settings = dict(settings)
    data, classes = settings.pop("identity", DATA), settings.pop("classes", CLASSES)
    with pytest.raises(UserError, match=words) as error:
        compared(data=data, classes=classes, **settings)
    assert "\n" not in str(error.value)


def test_another_data_set_when_told():
    start = compared_start(data={"data set": "zzz", "samples": "bbb"}, allow_data_change=True)
    (line,) = start.notices
    assert "aaa then, zzz now" in line and start.progress["bad"] == {}
    with pytest.raises(UserError, match="other classes"):
        compared(classes=CLASSES[:2], data={"data set": "zzz", "samples": "bbb"}, allow_data_change=True)


def test_only_the_weights_need_only_the_network():
    more = {"seed": 7, "img_size": 192, "lr": 0.5, "resume": "runs/x", "resume_weights_only": True}
    (line,) = compared(weights_only=True, data={"data set": "zzz", "samples": "yyy"}, **more)
    assert "training starts anew" in line
    with pytest.raises(UserError, match="another model"):
        compared(weights_only=True, model="resnet18")
    with pytest.raises(UserError, match="--resume-weights-only needs --resume PATH"):
        Config(resume="auto", resume_weights_only=True)


def test_a_checkpoint_of_an_older_version_lacks_new_settings():
    saved = copy.deepcopy(meta())
    for name in ("cache_gb", "oversample", "model_ema"):
        del saved["config"][name]
    assert compared(saved=saved, oversample=["cat=3"], model_ema=False) == []


# ---- finding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    """Three checkpoints of a file each."""
    for step in (10, 20, 30):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * step)
        files = {"data": {"bytes": step, "sha256": storage.sha256(folder / "data")}}
        (folder / "meta.json").write_text(json.dumps({"files": files}))
    return tmp_path / "run"


def found(run: Path, text: str, **settings) -> Start:
    return resume.find(Config(resume=text, **settings), run)


def step(start: Start) -> int:
    return storage.step_of(start.checkpoint)


def test_auto_takes_the_newest_and_a_path_takes_what_it_names(run, tmp_path):
    assert step(found(run, "auto")) == 30
    assert found(tmp_path / "other", "").checkpoint is None
    assert found(tmp_path / "other", "auto").checkpoint is None
    assert step(found(tmp_path / "other", str(run / "checkpoints" / "step-00000010"))) == 10
    assert step(found(tmp_path / "other", str(run))) == step(found(run, str(run / "checkpoints"))) == 30
    with pytest.raises(UserError, match=r"--resume .*typo: no complete checkpoint"):
        found(run, str(tmp_path / "typo"))


def test_a_new_run_does_not_overwrite_one_that_is_there(run, tmp_path):
    with pytest.raises(UserError, match="run holds a run already; --resume auto"):
        found(run, "")  # its log may have been deleted: the checkpoints are enough
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "log.jsonl").touch()
    with pytest.raises(UserError, match="logged holds a run already"):
        found(tmp_path / "logged", "")
    with pytest.raises(UserError, match="logged holds a run that was not started from --resume"):
        found(tmp_path / "logged", str(run))
    assert found(tmp_path / "logged", "auto").checkpoint is None


def test_a_path_in_the_runs_own_folder_gives_nothing_up(run):
    newest = run / "checkpoints" / "step-00000030"
    for text in (run, run / "checkpoints", newest, run / ".." / "run"):
        start = found(run, str(text))
        assert step(start) == 30 and start.origin == ""
    with pytest.raises(UserError, match="is at step 30 already, and going back would give that up"):
        found(run, str(newest.with_name("step-00000020")))


def test_a_path_starts_a_new_run_once(run, tmp_path):
    """The same command given again goes on with what it has made; another run's folder is not touched."""
    path = run / "checkpoints" / "step-00000020"
    start = found(tmp_path / "new", str(path))
    assert step(start) == 20 and start.origin == str(path)
    then = {"step": 20, "samples_seen": 640, "best": {"map": 0.9}, "best_step": 20, "stale": 2, "bad": {"x": "torn"}}
    start.meta = {"progress": then}
    same = {name: start.progress[name] for name in ("step", "samples_seen", "bad")}
    assert same == {name: then[name] for name in same}
    assert (start.progress["best"], start.progress["best_step"], start.progress["stale"]) == (None, None, 0)

    new = tmp_path / "new" / "checkpoints" / "step-00000040"
    shutil.copytree(path, new)
    with pytest.raises(UserError, match=r"holds a run that was not started from --resume .*another --experiment"):
        found(tmp_path / "new", str(path))
    meta = json.loads((new / "meta.json").read_text())
    (new / "meta.json").write_text(json.dumps(meta | {"progress": {"origin": start.origin}}))
    again = found(tmp_path / "new", str(path))
    assert step(again) == 40 and again.origin == "" and "goes on from them" in again.notices[0]


def test_a_new_run_that_died_before_its_first_checkpoint_starts_again(run, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "log.jsonl").touch()
    (new / "args.yaml").write_text(f"resume: {run}\n")
    start = found(new, str(run))
    assert step(start) == 30 and start.origin == str(run)
    with pytest.raises(UserError, match="was not started from"):
        found(new, str(run / "checkpoints" / "step-00000010"))


def test_a_damaged_newest_checkpoint_is_left_out_with_the_reason(run):
    folders = storage.complete(run / "checkpoints")
    (folders[2] / "data").write_bytes(b"y" * 30)
    start = found(run, "auto")
    assert step(start) == 20 and len(start.notices) == 1
    assert "step-00000030 is damaged and left out: data is not what was written" in start.notices[0]
    (folders[1] / "meta.json").write_text('{"files"')
    assert step(found(run, str(run))) == 10
    with pytest.raises(UserError, match="no other checkpoint"):  # a path of one means that one
        found(run, str(folders[2]))
    (folders[0] / "data").unlink()
    with pytest.raises(UserError, match="data is missing; there is no other checkpoint"):
        found(run, "auto")


def test_a_start_from_weights_is_made_once(run, tmp_path):
    flags = {"resume_weights_only": True, "lr": 1e-4}
    new = tmp_path / "new"
    start = found(new, str(run), **flags)
    assert step(start) == 30 and start.weights_only
    (new / "checkpoints").mkdir(parents=True)
    (new / "args.yaml").write_text(f"resume: {run}\n")
    (run / "checkpoints" / "step-00000010").rename(new / "checkpoints" / "step-00000010")
    start = found(new, str(run), **flags)  # the same command after a stop
    assert step(start) == 10 and not start.weights_only and "goes on from them" in start.notices[0]
    with pytest.raises(UserError, match="give another --experiment than run"):
        found(run, str(run), **flags)


def test_checkpoints_kept_elsewhere(run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "run-elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run-elsewhere").rename(tmp_path / "elsewhere" / "run")
    (run / "args.yaml").write_text(f"checkpoint_dir: {tmp_path / 'elsewhere'}\n")
    assert step(found(run, "auto", checkpoint_dir=str(tmp_path / "elsewhere"))) == 30
    assert step(found(tmp_path / "other", str(run))) == 30  # where the run's settings say
    assert found(run, "auto").checkpoint is None
