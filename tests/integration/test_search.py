"""The search on a real Ray: students stopped early, failing, killed, and a driver that dies and is taken up again."""

import contextlib
import json
import shutil
import signal
import threading
import time
from unittest import mock

import psutil
import pytest
import ray
import torch
from conftest import CLASSES, scenes_on_disk, tiny_recipe
from drivers import SEARCH, Driver
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.state import list_placement_groups

from softlabel.config import Execution, Tiles
from softlabel.errors import RecipeError, StoreError, TrainingError
from softlabel.labelling.job import recipe_label_job
from softlabel.labelling.run import label
from softlabel.recipe_file import load_recipe
from softlabel.search.dispatcher import Dispatcher
from softlabel.search.run import Inputs, search
from softlabel.search.worker_groups import num_groups
from softlabel.store import is_done, read_json
from softlabel.training.job import scaling
from softlabel.training.targets import STATE
from softlabel.workflows.search import search_experiment

pytestmark = pytest.mark.usefixtures("ray_session")
KEY = "train.threshold"
LOW = {"min": 0.01, "max": 0.3}  # the teacher is untrained, and sure of nothing


def searched(weights, trials, **search):
    return tiny_recipe(
        label={"weights": str(weights), "splits": ["train_2", "val_1"], "engine": "pytorch"},
        search={"trials": trials, "space": {KEY: LOW}, "grace_epochs": 1, "reduction_factor": 2, **search},
        execution={"workers": 1, "cpus_per_worker": 1.5},
    )


@pytest.fixture(scope="module")
def store(weights, tiles):
    """Soft labels of what the students learn from."""
    recipe = searched(weights, 1)
    (folder,) = label(recipe, [recipe_label_job(recipe, tiles)], tiles.parent)
    return folder


def inputs(recipe, tmp_path, tiles, store):
    return Inputs(recipe, tmp_path, tiles, store, "val_1", {"teacher's F1": 0.1})


def groups_left():
    address = ray.get_runtime_context().gcs_address  # others may be tested beside, with a Ray of their own
    return [group for group in list_placement_groups(address=address) if group["state"] != "REMOVED"]


def wait_for_no_groups():
    deadline = time.monotonic() + 60
    while groups_left():
        assert time.monotonic() < deadline, groups_left()
        time.sleep(0.2)


def kill_a_worker_after_an_epoch(folder, killed):
    """Kill -9 one training worker once the first state of a student lies there."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not killed:
        if list(folder.glob("students/*/state.pt")):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]) and not killed:
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
        time.sleep(0.02)


def eventful(weights, trials):
    """Students of which some ask for an optimizer that does not exist, which only their worker finds out."""
    space = {KEY: LOW, "train.student.args.optimizer": {"choices": ["SGD", "NoSuchOptimizer"]}}
    return searched(weights, trials, space=space, sampler="random", explore=0.7)


def judging_dispatcher():
    """Makes up what students reach, the later ones less: small as they are they learn nothing at all."""

    class JudgingDispatcher(Dispatcher):
        async def report(self, group, history, seconds):
            return await super().report(group, self._judged(group, history), seconds)

        async def release(self, group, status, reason, history, seconds):
            await super().release(group, status, reason, self._judged(group, history), seconds)

        def _judged(self, group, history):
            quality = 0.9 * 0.9 ** int(self._groups[group].student)
            return [{**row, "map50": quality * row["epoch"] / 3} for row in history]

    return JudgingDispatcher


@pytest.fixture(scope="module")
def eventful_search(is_long, weights, tiles, store, tmp_path_factory):
    """A search whose students are stopped early, fail, and lose a worker by kill -9."""
    asked = inputs(eventful(weights, 24 if is_long else 8), tmp_path_factory.mktemp("eventful"), tiles, store)
    killed: list[int] = []
    before = psutil.Process().children(recursive=True)
    killer = threading.Thread(target=kill_a_worker_after_an_epoch, args=(asked.folder, killed))
    killer.start()
    judging = mock.patch("softlabel.search.worker_groups.Dispatcher", judging_dispatcher())
    with judging, mock.patch("softlabel.search.run._KEPT", 3):
        folder = search(asked, None, resume=False)
    killer.join()
    assert killed
    return asked, folder, read_json(folder / "search.json"), before


def ended(found, status):
    return [trial for trial in found["trials"] if trial["status"] == status]


def test_students_are_stopped_and_the_next_ones_start(eventful_search):
    asked, folder, found, _ = eventful_search
    assert len(found["trials"]) == asked.recipe.search.trials
    assert ended(found, "stopped") and ended(found, "finished")
    for trial in found["trials"]:
        student = folder / "students" / trial["folder"]
        assert [row["epoch"] for row in trial["history"]] == list(range(1, len(trial["history"]) + 1))
        assert is_done(student) == (trial["status"] == "finished")
        assert len(trial["history"]) == 3 or trial["status"] != "finished"
        if trial["status"] == "stopped" and (student / STATE).exists():  # where it waits it has not trained on
            assert torch.load(student / STATE, weights_only=True)["epoch"] + 1 == len(trial["history"]) < 3
    finished = ended(found, "finished")
    assert found["answer"]["values"] in [trial["values"] for trial in finished]
    assert 0 < found["start_up_share"] < 1 and found["cpu_hours"] > 0
    assert list((folder / "tune").rglob("events.out.tfevents.*"))


def test_a_student_that_fails_is_recorded_with_its_reason(eventful_search):
    _, _, found, _ = eventful_search
    failed = ended(found, "failed")
    assert failed and all("NoSuchOptimizer" in trial["reason"] and not trial["history"] for trial in failed)
    assert {trial["values"]["train.student.args.optimizer"] for trial in ended(found, "finished")} == {"SGD"}


def test_nothing_is_held_after_a_search(eventful_search):
    wait_for_no_groups()
    names = ("RayTrainWorker", "Dispatcher", "TrainController", "Student")

    def held():
        left = set(psutil.Process().children(recursive=True)) - set(eventful_search[-1])
        return [process.name() for process in left if any(name in process.name() for name in names)]

    deadline = time.monotonic() + 90
    while held() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert held() == []


def test_the_disk_holds_what_may_be_asked_for_and_no_more(eventful_search):
    """The fixture lets it keep three values' states at each of two rungs and three values' weights, beside those of the
    first points."""
    _, folder, found, _ = eventful_search
    values = {trial["folder"]: str(trial["values"]) for trial in found["trials"]}
    students = {student.name: {path.name for path in student.iterdir()} for student in (folder / "students").iterdir()}
    assert students.keys() <= values.keys()  # one that failed at once left nothing
    references = {str(one) for one in found["references"]}
    for name, most in (("state.pt", 6), ("weights.safetensors", 3)):
        assert len({values[student] for student, files in students.items() if name in files} - references) <= most
    best = [trial["folder"] for trial in ended(found, "finished") if trial["values"] == found["answer"]["values"]]
    assert best and all("weights.safetensors" in students[student] for student in best)
    assert not (folder / "ray").exists()


def test_a_search_that_is_there_is_not_begun_again(eventful_search):
    asked, folder, found, _ = eventful_search
    with pytest.raises(StoreError, match=r"finished: add --resume"):
        search(asked, None, resume=False)
    assert search(asked, None, resume=True) == folder
    assert read_json(folder / "search.json")["trials"] == found["trials"]


@pytest.mark.long
def test_nothing_but_failures_is_an_error_that_says_why(weights, tiles, store, tmp_path):
    recipe = searched(weights, 8, space={KEY: {"choices": [1.0]}})
    with pytest.raises(TrainingError, match=r"no student trained to the end .*no soft label of .* is above"):
        search(asked := inputs(recipe, tmp_path, tiles, store), None, resume=False)
    before = [path.stat().st_mtime_ns for path in asked.folder.glob("trials/*.json")]
    with pytest.raises(TrainingError, match=r"no student trained to the end .*no soft label of .* is above"):
        search(asked, None, resume=True)  # somebody may have mended what it was
    after = [path.stat().st_mtime_ns for path in asked.folder.glob("trials/*.json")]
    assert len(after) == len(before) == 5 and not set(after) & set(before)


def test_what_the_space_names_wrongly_is_said_before_anything_is_made(tmp_path):
    recipe = tiny_recipe(search={"space": {f"{KEY}.cars": LOW}})
    with pytest.raises(RecipeError, match=r"train\.threshold names car, plane, ship, cars"):
        search_experiment(recipe, tmp_path, None, resume=False)
    recipe = tiny_recipe(search={"space": {KEY: LOW, f"{KEY}.car": LOW}})
    with pytest.raises(RecipeError, match=r"train\.threshold"):
        search_experiment(recipe, tmp_path, None, resume=False)
    recipe = tiny_recipe(search={"space": {"train.student.args.lr": {"choices": [0.1]}}})
    with pytest.raises(RecipeError, match=r"args: lr is no ultralytics train argument"):
        search_experiment(recipe, tmp_path, None, resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_without_truth_in_the_test_split_there_is_an_answer_and_a_word_about_it(weights, tiles, tmp_path, capsys):
    """Images without a label file are background to YOLO: after hours this must not end in a traceback."""
    done = tmp_path / tiles.name / "done.json"
    shutil.copytree(tiles, done.parent)
    made = read_json(done)
    made["boxes_by_split"]["test"] = dict.fromkeys(made["boxes_by_split"]["test"], 0)
    done.write_text(json.dumps(made))
    search_experiment(searched(weights, 1, stop_early=False), tmp_path, None, resume=False)
    assert "There is no truth in a test split" in capsys.readouterr().out
    assert (tmp_path / "search.html").exists() and (tmp_path / "best.safetensors").exists()


@pytest.mark.long
def test_a_driver_killed_in_mid_trial_is_taken_up_again(weights, tmp_path, anywhere):
    """With a Ray of its own, which dies with it; one student at a time, so that the order is the same every time. What
    it varies is one class's threshold; the others have the recipe's."""
    recipe = searched(weights, 3, stop_early=False, sampler="random", explore=1.0, space={f"{KEY}.car": LOW})
    train = recipe.train.model_copy(update={"threshold": 0.02})
    tiles = Tiles.model_validate(scenes_on_disk(tmp_path / "made"))
    execution = Execution(workers=1, cpus_per_worker=2)
    recipe = recipe.model_copy(update={"tiles": tiles, "train": train, "execution": execution})
    run_dir = anywhere / "run"
    driver = Driver(recipe, run_dir, job=SEARCH)
    assert driver.wait_until(lambda: len(list(run_dir.glob("search-*/students/*/done.json"))) == 1), driver.said
    assert driver.wait_until(lambda: list(run_dir.glob("search-*/students/*/state.pt"))), driver.said
    driver.process.kill()
    driver.wait()
    (done,) = run_dir.glob("search-*/students/*/done.json")
    before = done.stat().st_mtime
    again = Driver(recipe, run_dir, "--resume", job=SEARCH)
    assert again.wait(500) == 0, again.said
    assert done.stat().st_mtime == before
    found = json.loads((run_dir / "search.json").read_text())
    assert [(trial["status"], len(trial["history"]), trial["seed"]) for trial in found["trials"]] == [
        ("finished", 3, 0)
    ] * 3
    assert len({trial["values"][f"{KEY}.car"] for trial in found["trials"]}) == 3
    best = load_recipe(run_dir / "best.yaml").train
    assert best.threshold == {**dict.fromkeys(CLASSES, 0.02), "car": found["answer"]["values"][f"{KEY}.car"]}
    for name in ("search.html", "best.yaml", "best.safetensors"):
        assert (run_dir / name).stat().st_size > 0


@pytest.mark.long
def test_a_budget_ends_the_search_and_a_larger_one_goes_on(weights, tiles, store, tmp_path):
    asked = inputs(searched(weights, 500), tmp_path, tiles, store)
    started = time.monotonic()
    found = read_json(search(asked, 90.0, resume=False) / "search.json")
    assert time.monotonic() - started < 90 + 75
    assert len(found["trials"]) < 500 and found["seconds"] == pytest.approx(90, abs=60)
    assert all(trial["status"] != "running" for trial in found["trials"])
    cut = [trial["number"] for trial in found["trials"] if trial["reason"] == "out of time"]
    again = read_json(search(asked, found["seconds"] + 90, resume=True) / "search.json")
    assert len(again["trials"]) >= len(found["trials"]) and again["seconds"] > found["seconds"]
    assert all(len(again["trials"][i]["history"]) == 3 for i in cut)


@pytest.mark.long
def test_a_lost_node_costs_what_ran_on_it_and_no_more(weights, tmp_path):
    """Two nodes with a student each; one goes without a word and does not come back."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    recipe = searched(weights, 4, stop_early=False)
    recipe = recipe.model_copy(update={"execution": Execution(workers=1, cpus_per_worker=1, cpus_per_actor=0.5)})
    run_dir = tmp_path / "run"
    try:
        driver = Driver(recipe, run_dir, job=SEARCH, env={"RAY_ADDRESS": cluster.address})
        students = "search-*/students/*"
        begun = lambda: [*run_dir.glob(f"{students}/state.pt"), *run_dir.glob(f"{students}/done.json")]  # noqa: E731
        assert driver.wait_until(lambda: len(begun()) >= 2), driver.said
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
        assert driver.wait(500) == 0, driver.said
    finally:
        cluster.shutdown()
    found = json.loads((run_dir / "search.json").read_text())
    assert [(trial["status"], len(trial["history"])) for trial in found["trials"]] == [("finished", 3)] * 4


def test_what_does_not_fit_is_refused_at_once():
    with pytest.raises(RecipeError, match=r"a student needs 1 workers of 9 CPU, 0 GPU, and 0 fit"):
        num_groups(Execution(cpus_per_worker=9))


def test_to_resume_another_recipe_s_search_is_said_to_begin_a_new_one(weights, tiles, store, tmp_path, capsys):
    earlier = inputs(searched(weights, 1, grace_epochs=2), tmp_path, tiles, store)
    earlier.folder.mkdir()
    (earlier.folder / "recipe.yaml").touch()
    recipe = searched(weights, 1).model_copy(update={"execution": Execution(cpus_per_worker=9)})
    with pytest.raises(RecipeError, match="lower execution"):  # which is as far as it needs to go
        search(inputs(recipe, tmp_path, tiles, store), None, resume=True)
    assert "is of another recipe: a new one begins" in capsys.readouterr().out


def test_small_students_share_a_gpu():
    """With GPUs that Ray only counts: the session's Ray has two, and three CPUs."""
    half = Execution(gpus_per_worker=0.5, cpus_per_worker=0.25)
    assert num_groups(half) == 4
    assert num_groups(Execution(gpus_per_worker=0.5, cpus_per_worker=0.25, workers=2)) == 2
    assert num_groups(Execution(gpus_per_worker=0.5, cpus_per_worker=1)) == 3
    bundle = scaling(half)["resources_per_worker"]
    groups = [placement_group([bundle]) for _ in range(5)]
    try:
        ready, waiting = ray.wait([group.ready() for group in groups], num_returns=5, timeout=10)
        assert (len(ready), len(waiting)) == (4, 1)
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)
