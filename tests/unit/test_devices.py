"""What a run takes of the GPUs that there are."""

import pytest
from conftest import tiny_recipe

from softlabel.cli import _store
from softlabel.devices import possible, with_gpus
from softlabel.errors import RecipeError, StoreError
from softlabel.labelling.job import recipe_label_job
from softlabel.recipe_file import load_recipe
from softlabel.store import finish


def taken(gpus, side_by_side=False, label=None, batch=16, **execution):
    model = {"model": "yolov5n.yaml", "args": {"batch": batch} if batch else {}}
    train = {"teacher": model, "student": {"model": "yolov5n.yaml"}}
    recipe = tiny_recipe(execution=execution, label=label or {}, train=train)
    found = with_gpus(recipe, gpus, side_by_side=side_by_side).execution
    return found.actors, found.gpus_per_actor, found.workers, found.gpus_per_worker


@pytest.mark.parametrize(
    ("gpus", "execution", "expected"),
    [
        (0, {}, (1, 0, 1, 0)),
        (1, {}, (1, 1, 1, 1)),
        (2, {}, (2, 1, 2, 1)),
        (8, {}, (8, 1, 2, 1)),  # of the batch's 16 tiles each worker has 8
        (8, {"actors": 1, "workers": 1}, (1, 1, 1, 1)),
        (2, {"actors": 3}, (3, 0.5, 2, 1)),  # two on one, one on the other
        (1, {"actors": [1, 4]}, ((1, 4), 1, 1, 1)),
        (2, {"gpus_per_actor": 0.5}, (4, 0.5, 2, 1)),
        (2, {"gpus_per_actor": 0}, (1, 0, 2, 1)),
        (2, {"gpus_per_worker": 0}, (2, 1, 1, 0)),
        (2, {"gpus_per_worker": 0.5}, (2, 1, 2, 0.5)),
        (4, {"gpus_per_worker": 2}, (4, 1, 2, 2)),
        (2, {"device": "cpu"}, (1, 0, 1, 0)),
    ],
)
def test_what_is_left_open_follows_from_the_gpus_that_there_are(gpus, execution, expected):
    assert taken(gpus, **execution) == expected


def test_no_worker_gets_less_than_eight_tiles_of_a_batch_or_a_part_of_one():
    assert [taken(8, batch=batch)[2] for batch in (8, 16, 12, 64, None)] == [1, 2, 1, 2, 2]
    assert taken(3, batch=16)[2] == 2


def test_students_beside_each_other_have_a_gpu_each():
    assert taken(4, side_by_side=True) == (4, 1, 1, 1)


def test_openvino_labels_on_cpus_and_its_students_train_on_gpus():
    assert taken(1, label={"engine": "openvino"}) == (1, 0, 1, 1)


def test_what_labels_may_have_been_made_on():
    def found(**changes):
        return [recipe.execution.gpus_per_actor for recipe in possible(tiny_recipe(**changes))]

    assert found() == [1, 0]
    assert found(label={"precision": "float16"}) == [1]
    assert found(label={"engine": "openvino"}) == [0]
    assert found(execution={"gpus_per_actor": 0}) == [0]
    assert found(execution={"gpus_per_actor": 0.5}) == [0.5]


def test_no_gpu_and_a_gpu_is_a_mistake():
    with pytest.raises(RecipeError, match=r"device: cpu uses no GPU, and gpus_per_worker asks for one: remove either"):
        load_recipe("demo", ["execution.device=cpu", "execution.gpus_per_worker=1"])


def test_labels_are_found_whatever_made_them(tmp_path, weights, tiles, capsys):
    """By verbs that join no cluster, and so do not know its GPUs."""
    recipe = tiny_recipe(label={"weights": str(weights)})
    gpu, cpu = (recipe_label_job(each, tiles).folder(tmp_path) for each in possible(recipe))
    assert gpu != cpu
    with pytest.raises(StoreError, match=f"{cpu.name} is not finished"):
        _store(recipe, tmp_path, tiles)
    finish(cpu, {})
    assert _store(recipe, tmp_path, tiles) == cpu and not capsys.readouterr().out
    finish(gpu, {})
    assert _store(recipe, tmp_path, tiles) == gpu
    assert f"labels of a GPU and of a CPU are here: taking {gpu.name}" in capsys.readouterr().out
    cpu_alone = tiny_recipe(label={"weights": str(weights)}, execution={"device": "cpu"})
    assert _store(cpu_alone, tmp_path, tiles) == cpu
