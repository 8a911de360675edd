"""How actors and readers share CPUs and GPUs."""

import pytest

from softlabel.config import Execution
from softlabel.errors import RecipeError
from softlabel.labelling.resources import Resources


def resources(nodes, gpus=0, **execution):
    return Resources(Execution(**execution), nodes, gpus)


@pytest.mark.parametrize(
    ("nodes", "actors", "cpus", "readers"),
    [
        ((2,), 1, 1.75, 1),
        ((2,), 2, 0.75, 2),
        ((16,), 4, 3.75, 4),
        ((8, 8), 1, 7.75, 1),
        ((8, 8), [1, 2], 7.75, 2),
        ((4, 12), 2, 5.75, 2),
        ((4, 12), 4, 3.75, 4),
        ((0, 4), 1, 3.75, 1),  # a head that lends none
    ],
)
def test_without_gpus_the_actors_share_what_the_readers_leave(nodes, actors, cpus, readers):
    found = resources(nodes, actors=actors)
    assert (found.cpus_per_actor, found.readers, found.cpus_per_reader) == (cpus, readers, 0.25)
    assert found.most_actors * found.cpus_per_actor + found.readers * found.cpus_per_reader <= sum(nodes)
    found.check()


def test_threads_never_pass_what_an_actor_reserves():
    assert resources((64,), actors=32).threads == 2
    assert resources((64,), actors=1).threads == 64
    assert resources((64,), actors=1, cpus_per_actor=0.5).threads == 1


def test_a_gpu_is_fed_by_all_cpus_that_are_left():
    found = resources((16,), gpus=2, actors=2, gpus_per_actor=1)
    assert (found.cpus_per_actor, found.cpus_per_reader, found.readers) == (1, 1, 14)
    found = resources((8, 8, 4), gpus=2, actors=[1, 2], gpus_per_actor=1, cpus_per_actor=2)
    assert (found.cpus_per_actor, found.readers) == (2, 16)
    found = resources((2,), gpus=2, actors=2, gpus_per_actor=1)
    assert found.readers == 2
    with pytest.raises(RecipeError, match="needs 3 CPU"):
        found.check()


def test_a_gpu_is_fed_by_the_readers_that_the_recipe_names():
    found = resources((16,), gpus=2, actors=4, gpus_per_actor=0.5, reader_cpus_per_actor=3)
    assert (found.cpus_per_reader, found.readers) == (1, 12)
    found.check()


@pytest.mark.parametrize(
    ("nodes", "gpus", "execution", "says"),
    [
        ((2,), 0, {"actors": 2, "cpus_per_actor": 1}, r"needs 2\.25 CPU .* has 2: lower execution\.actors"),
        ((8,), 1, {"actors": [2, 4], "gpus_per_actor": 1}, r"needs 2 GPU .* has 1: .*gpus_per_actor"),
        ((0.3,), 0, {}, r"needs 0\.5 CPU"),
        ((0,), 0, {}, r"needs 0\.5 CPU .* has 0"),
        ((), 0, {}, r"needs 0\.5 CPU .* has 0"),
    ],
)
def test_what_could_never_start_is_refused(nodes, gpus, execution, says):
    with pytest.raises(RecipeError, match=says):
        resources(nodes, gpus, **execution).check()


def test_what_has_to_be_there_at_least():
    found = resources((), actors=[2, 8], gpus_per_actor=1, cpus_per_actor=3)
    assert found.bundles == [{"CPU": 3, "GPU": 1}] * 2 + [{"CPU": 1}]
