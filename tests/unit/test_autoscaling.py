"""Waiting for a cluster to grow."""

import pytest

from softlabel import autoscaling
from softlabel.config import Execution
from softlabel.errors import RecipeError
from softlabel.search import worker_groups

BUNDLES = [{"CPU": 1, "GPU": 1}, {"CPU": 0.5, "GPU": 0}]


@pytest.fixture
def asked(monkeypatch):
    """What the autoscaler was asked for, in order."""
    found = []
    monkeypatch.setattr(autoscaling, "request_resources", lambda bundles: found.append(bundles))
    monkeypatch.setattr(autoscaling, "_LOOK_S", 0.0)
    return found


def small(times):
    """What says as often that the cluster is too small, and then what it found."""
    left = iter(range(times))

    def find():
        if next(left, None) is not None:
            raise RecipeError("labelling needs 1 GPU, the cluster has 0: lower it")
        return "there"

    return find


def test_it_asks_as_long_as_it_waits_and_lets_go(asked, capsys):
    assert autoscaling.wait_for(small(3), BUNDLES, 10) == "there"
    assert asked == [[{"CPU": 1, "GPU": 1}, {"CPU": 0.5}]] * 3 + [[]]
    said = "waiting for the autoscaler, 10 min at most: labelling needs 1 GPU, the cluster has 0\n"
    assert capsys.readouterr().out == said


def test_what_is_there_is_not_waited_for_and_nothing_stays_asked_for(asked):
    assert autoscaling.wait_for(small(0), BUNDLES, 10) == "there"
    assert asked == [[]]


def test_nobody_waits_who_was_not_told_to(asked):
    with pytest.raises(RecipeError, match="the cluster has 0: lower it"):
        autoscaling.wait_for(small(1), BUNDLES, 0)
    assert asked == []


def test_in_the_end_it_gives_up_and_lets_go(asked):
    with pytest.raises(RecipeError, match="the cluster has 0"):
        autoscaling.wait_for(small(10**9), BUNDLES, 1e-3)
    assert asked[0] and not asked[-1]


def test_a_search_waits_for_its_first_worker_group(monkeypatch):
    asked = []
    monkeypatch.setattr(worker_groups, "wait_for", lambda find, bundles, minutes: asked.append((bundles, minutes)) or 3)
    execution = Execution(workers=2, cpus_per_worker=4, gpus_per_worker=1, wait_minutes=15)
    assert worker_groups.num_groups(execution) == 3
    assert asked == [([{"CPU": 4, "GPU": 1}] * 2, 15)]
