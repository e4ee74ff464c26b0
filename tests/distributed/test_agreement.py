"""One process decides, all are told: nothing that a process finds out alone takes it another way than the others."""

import pytest
import worlds
from conftest import log_of
from test_strategies import train_args

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_with_another_opinion_of_the_metrics_is_not_asked(strategy, shards, tmp_path):
    flags = ["--lr", "1e-30", "--strategy", strategy, "--eval-every", "1st", "--patience", "3", "--no-model-ema"]
    worlds.train(2, train_args(shards, tmp_path, 9, 4, *flags), "another_opinion")
    evaluated = [line["step"] for line in log_of(tmp_path / "run") if "val/map" in line]
    assert evaluated == [1, 2, 3, 4]  # as the first process counts


def test_a_process_with_another_setting_ends_all(shards, tmp_path):
    codes, said = worlds.ask(2, train_args(shards, tmp_path, 2, 4), "another_setting")
    assert codes == [2, 2]
    assert "process 1 was started with another lr: 0.25, the first one has 0.001" in said
    assert "same command, files and versions" in said and not (tmp_path / "run").exists()
