"""When self-training ends, and what each round learns from; labelling and training are stand-ins."""

import pytest
from conftest import tiny_recipe
from made_stores import made_store, made_tile
from safetensors.numpy import save_file

from softlabel.config import Soft
from softlabel.store import file_digest, finish
from softlabel.training.job import train_job
from softlabel.training.targets import WEIGHTS
from softlabel.workflows import self_training
from softlabel.workflows.self_training import self_train


class Run:
    """Students whose validation mAP50 is known beforehand, by seed and round."""

    def __init__(self, folder, monkeypatch, map50):
        self.folder, self.map50, self.labelled = folder, map50, []
        made = [made_tile("s", (0, 0, 64, 64), split=split, truth=[]) for split in ("train_1", "val_1")]
        self.store = made_store(folder, made)
        monkeypatch.setattr(self_training, "label", self._label)
        monkeypatch.setattr(self_training, "label_job", lambda *args, **how: (args, how))
        self.recipe = tiny_recipe()

    def first(self, seed):
        job = train_job(
            self.recipe.model_copy(update={"seed": seed}),
            self.folder,
            f"s{seed}",
            self.recipe.train.student,
            tiles=self.folder / "tiles-made",
            split="train_1",
            val_split="val_1",
            soft_labels=self.store,
            threshold=0.3,
            soft=Soft(weight_power=1.0),
            drop=0.5,
        )
        self.train([job])
        return job

    def train(self, jobs):
        failed = []
        for job in jobs:
            number = int(job.name.partition("_round")[2] or 1)
            found = self.map50[job.seed][number - 1]
            if found is None:
                failed.append(job.name)
                continue
            save_file({}, job.folder.parent / "empty", {"of": job.name})
            job.folder.mkdir()
            (job.folder.parent / "empty").rename(job.folder / WEIGHTS)
            finish(job.folder, {"val_map50": found})
        return failed

    def _label(self, recipe, jobs, run_dir):
        stores = []
        for (_, name, weights, tiles, splits), how in jobs:
            assert how == {"teaches": True} and tiles == self.folder / "tiles-made" and splits == ["train_1"]
            self.labelled.append((name, file_digest(weights)))
            stores.append(run_dir / f"label-{name}")
        return stores


@pytest.fixture
def run(tmp_path, monkeypatch):
    return lambda **map50: Run(tmp_path, monkeypatch, {int(seed[1:]): values for seed, values in map50.items()})


def test_a_student_goes_on_as_long_as_its_validation_rises(run):
    one = run(s0=[0.2, 0.3, 0.3, 0.9], s1=[0.4, 0.3, 0.9], s2=[0.1, 0.2, 0.3, 0.4], s3=[0.5, None])
    first = {seed: one.first(seed) for seed in range(4)}
    best = self_train(one.recipe, one.folder, first, {0: 9, 1: 9, 2: 3, 3: 9}, one.train)
    assert [best[seed].name for seed in range(4)] == ["s0_round2", "s1", "s2_round3", "s3"]
    assert {path.name.split("-")[1] for path in one.folder.glob("train-*_round*")} == {
        *("s0_round2", "s0_round3", "s1_round2", "s2_round2", "s2_round3")
    }


def test_a_round_learns_from_the_labels_of_the_one_before_and_starts_from_its_weights(run):
    one = run(s0=[0.1, 0.2, 0.3])
    first = one.first(0)
    third = self_train(one.recipe, one.folder, {"a": first}, {"a": 3}, one.train)["a"]
    (second,) = one.folder.glob("train-s0_round2-*")
    assert one.labelled == [
        ("train_set_by_s0", file_digest(first.folder / WEIGHTS)),
        ("train_set_by_s0_round2", file_digest(second / WEIGHTS)),
    ]
    assert third.weights == (second / WEIGHTS).resolve() and third.soft_labels.name == "label-train_set_by_s0_round2"
    assert (third.threshold, third.soft, third.seed, third.args) == (0.3, first.soft, 0, first.args)
    assert (third.drop, first.drop) == (0.0, 0.5)


def test_one_round_is_the_student_itself(run):
    one = run(s0=[0.1])
    first = one.first(0)
    assert self_train(one.recipe, one.folder, {"a": first}, {"a": 1}, one.train) == {"a": first}
    assert not one.labelled
