"""`best/` and the checkpoints: whichever of them a kill leaves behind, they tell one story."""

import json
from pathlib import Path

import pytest

from mlc.kept_weights import forget_aside, restore_best, step_of, written_whole


def keep(run: Path, step: int, saved: int | None) -> None:
    with written_whole(run, "best", keep_step=saved) as building:
        building.mkdir()
        (building / "model.safetensors").write_text(f"weights of {step}")
        (building / "config.json").write_text(json.dumps({"mlc": {"step": step}}))


def progress(step: int | None) -> dict:
    return {"best": step and {"map": step / 10}, "best_step": step, "stale": 1}


def test_the_best_of_a_training_that_was_given_up(tmp_path):
    keep(tmp_path, 2, saved=None)
    for step in (4, 6):  # after the checkpoint that knows of 2, before the next one
        keep(tmp_path, step, saved=2)
    assert step_of(tmp_path / "best") == 6
    then = progress(2)
    assert "is that of step 2 again" in restore_best(tmp_path, then)
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights of 2"
    assert then == progress(2) and restore_best(tmp_path, then) == ""  # also when it is killed right away


def test_a_best_that_is_lost_begins_anew(tmp_path):
    keep(tmp_path, 2, saved=None)
    keep(tmp_path, 4, saved=2)
    forget_aside(tmp_path)
    then = progress(2)
    assert "has not the weights of step 2" in restore_best(tmp_path, then)
    assert then == {"best": None, "best_step": None, "stale": 0} and step_of(tmp_path / "best") == 4
    assert restore_best(tmp_path, progress(4)) == "" and restore_best(tmp_path, progress(None)) == ""


def test_half_of_it_is_never_seen(tmp_path):
    keep(tmp_path, 2, saved=None)
    with pytest.raises(OSError), written_whole(tmp_path, "best", keep_step=2) as building:
        building.mkdir()
        (building / "model.safetensors").write_text("weights of 4")
        raise OSError("disk full")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights of 2"
    keep(tmp_path, 5, saved=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]
