"""Two runs side by side on one machine, each with a Ray of its own; one of them loses a worker."""

import re

import psutil
import pytest
from conftest import tiny_recipe
from drivers import JOBS, Driver

from softlabel.session import LOG
from softlabel.status import status
from softlabel.store import summary

EPOCHS = 6
TIMES = [pytest.param(number, marks=[pytest.mark.long] if number else []) for number in range(4)]


def workers(driver):
    """Its training workers."""
    found = psutil.Process(driver.process.pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in process.name()]


def state(driver):
    return list(driver.run_dir.glob("train-*/state.pt"))


@pytest.mark.parametrize("number", TIMES)
def test_each_run_knows_its_own_ray(tmp_path, number):
    recipe = tiny_recipe()
    student = recipe.train.student.model_copy(update={"args": {**recipe.train.student.args, "epochs": EPOCHS}})
    train = recipe.train.model_copy(update={"labels": "truth", "split": "train_1", "student": student})
    recipe = recipe.model_copy(update={"train": train})
    runs = [Driver(recipe, tmp_path / name, job=JOBS / "train.py") for name in ("one", "two")]
    unlucky = runs[number % 2]
    assert unlucky.wait_until(lambda: state(unlucky)), unlucky.said
    assert re.search(rf"epoch \d of {EPOCHS}, best validation mAP50 0\.\d+ .* an epoch", status(unlucky.run_dir))
    killed = workers(unlucky)
    for process in killed:
        process.kill()
    assert killed and [run.wait() for run in runs] == [0, 0], [run.said for run in runs]
    for run in runs:
        (folder,) = run.run_dir.glob("train-*")
        assert [row["epoch"] for row in summary(folder)["history"]] == [*range(1, EPOCHS + 1)]
        assert "multiple active Ray instances" not in (run.run_dir / LOG).read_text()
        assert run.said.startswith(f"log: {run.run_dir / LOG}\n") and "pid=" not in run.said
    assert "student: resumed after epoch" in unlucky.said
