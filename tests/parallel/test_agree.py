"""What the first process finds is what all have."""

import pytest

from mlc.parallel import agree
from shards.console import UserError


@pytest.fixture
def second(monkeypatch):
    """This is the second of two processes; `tell` says what the first one sends."""
    monkeypatch.setattr(agree.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(agree.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(agree.dist, "get_world_size", lambda: 2)

    def tell(sent) -> None:
        monkeypatch.setattr(agree.dist, "broadcast_object_list", lambda found, src: found.__setitem__(0, sent))

    return tell


def test_alone_it_is_a_call():
    assert agree.from_first(lambda: 7) == 7 and agree.gathered("a") == ["a"]
    agree.require_same({"lr": 0.1})


def test_the_second_does_not_look_but_is_told(second):
    second({"map": 0.5})
    assert agree.from_first(lambda: pytest.fail("it is the first's to do")) == {"map": 0.5}
    second(UserError("held"))
    with pytest.raises(UserError, match="held"):
        agree.from_first(lambda: pytest.fail("it is the first's to do"))


def test_what_must_be_the_same_names_process_and_values(second, monkeypatch):
    others = {"lr": "0.1", "seed": "7"}
    monkeypatch.setattr(
        agree.dist, "all_gather_object", lambda values, own: values.__setitem__(slice(2), [others, own])
    )
    agree.require_same({"lr": 0.1, "seed": 7})
    with pytest.raises(UserError, match=r"process 1 was started with another lr: 0.2, the first one has 0.1; all need"):
        agree.require_same({"lr": 0.2, "seed": 7})
