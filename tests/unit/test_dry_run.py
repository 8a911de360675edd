"""`--dry-run`: every verb with every recipe, values as they will be, and nothing written."""

import os

import cv2
import numpy as np
import pytest
from conftest import tiny_recipe

from softlabel.cli import _VERBS, main
from softlabel.dry_run import plan
from softlabel.errors import RecipeError, SceneError, WeightsError
from softlabel.recipe_file import RECIPES, dump_recipe, load_recipe


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.full((64, 80, 3), 90, np.uint8))
    return tmp_path / "images"


@pytest.mark.parametrize("verb", _VERBS)
@pytest.mark.parametrize("recipe", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_every_verb_with_every_recipe(images, tmp_path, monkeypatch, capsys, verb, recipe):
    monkeypatch.chdir(tmp_path)
    scenes = [] if recipe in ("demo", "methods", "synthetic") else ["--set", f"tiles.scenes={images}"]
    extra = ["--vocabulary", "words.txt"] if verb == "categorize" else []
    assert main([verb, "--config", recipe, *scenes, *extra, "--run-dir", "run", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {verb} into {tmp_path / 'run'}\nname: {recipe}\n")
    assert "# labelling: 1 actor of " in out and "# training: 1 worker of " in out
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def lines(*, trains=True, **changes):
    return list(plan(tiny_recipe(**changes), trains=trains, labels=False))


@pytest.mark.parametrize(
    ("execution", "label", "said"),
    [
        (
            {},
            {},
            "1 actor of {all:g} CPU and 0 GPU, openvino in float32, tile by tile",
        ),
        (
            {"cpus_per_actor": 1.5},
            {"engine": "pytorch"},
            "1 actor of 1.5 CPU and 0 GPU, pytorch in float32, 4 tiles per forward pass",
        ),
        (
            {"actors": [1, 3], "cpus_per_actor": 0.5, "batch_size": 7},
            {"engine": "pytorch", "precision": "bfloat16"},
            "1 to 3 actors of 0.5 CPU and 0 GPU, pytorch in bfloat16, 7 tiles per forward pass",
        ),
        (
            {"actors": 1000, "cpus_per_actor": 4},
            {"engine": "pytorch"},
            "1000 actors of 4 CPU and 0 GPU, pytorch in float32, 4 tiles per forward pass: more than the {cpus:g} "
            "CPUs here",
        ),
        (
            {"actors": 8, "gpus_per_actor": 1},
            {},
            "8 actors of 1 CPU and 1 GPU, pytorch in float16, as many tiles as fit per forward pass",
        ),
    ],
)
def test_values_are_as_they_will_be(execution, label, said):
    expected = "labelling: " + said.format(all=os.cpu_count() - 0.25, cpus=os.cpu_count())
    assert expected in lines(execution=execution, label=label)


def test_what_cannot_run_here_is_said():
    with pytest.raises(RecipeError, match="float16 needs CUDA"):
        lines(label={"precision": "float16"})


def test_a_train_argument_without_effect_is_said_before_anything_is_done():
    train = {"student": {"args": {"rect": True}}}
    with pytest.raises(RecipeError, match=r"train\.student\.args: rect has no effect"):
        lines(train=train)
    assert lines(train=train, trains=False)  # whoever only labels is not asked


def test_a_bad_scene_does_not_end_it(images):
    (images / "bad.png").write_bytes(b"no image")
    found = lines(tiles={"scenes": str(images), "size_px": 64})
    assert found[0] == f"scenes: 4 at {images}"
    assert found[1].startswith("1 of 4 sampled scenes cannot be read: cannot read scene") and "bad.png" in found[1]
    assert found[2].startswith("tiles: about 6 of 64 px")
    for image in images.iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(SceneError, match=r"none of 4 sampled scenes can be read; the first: .*0\.png"):
        lines(tiles={"scenes": str(images)})


@pytest.mark.parametrize(
    ("weights", "engine"), [("best.pt", "openvino"), ("best.onnx", "pytorch"), ("PekingU/rtdetr_r18vd", "pytorch")]
)
def test_the_engine_is_that_of_the_teacher(weights, engine):
    recipe = load_recipe("demo", [f"label.weights={weights}"])
    (line,) = (line for line in plan(recipe, trains=False, labels=False) if line.startswith("labelling"))
    assert f"{engine} in float32" in line


def test_a_teacher_that_cannot_label_is_said_before_scenes_are_read(tmp_path, capsys):
    (tmp_path / "best.pt").write_text("no checkpoint")
    recipe = tiny_recipe(tiles={"scenes": str(tmp_path / "gone")}, label={"weights": str(tmp_path / "best.pt")})
    with pytest.raises(WeightsError, match=r"best\.pt cannot be read as a checkpoint"):
        list(plan(recipe, trains=False, labels=True))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    for flags in ([], ["--dry-run"]):
        assert main(["label", "--config", str(path), "--run-dir", str(tmp_path / "run"), *flags]) == 2
        assert "best.pt cannot be read as a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "changes", "problem"),
    [
        (
            "compare",
            {"compare": {"methods": {"up": {"train.soft.ignore_above": 0.5}}}},
            "methods.up: train.soft",
        ),
        (
            "train",
            {"train": {"soft": {"ignore_above": 0.4}}},
            "ignore_above is 0.4 for car, not below its threshold of 0.3",
        ),
        ("train", {"train": {"labels": "truth", "soft": {"rounds": 2}}}, "train.soft.rounds is about soft labels"),
        ("experiment", {"train": {"soft": {"ignore_above": 0.4}}}, "not below its threshold of 0.3"),
        ("search", {"search": {"space": {"train.student.args.rect": {"choices": [True]}}}}, "rect has no effect"),
        ("compare", {"compare": {"methods": {"low": {"train.threshold": 0.1}}, "seeds": 3}}, None),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(verb, changes, problem, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny_recipe(**changes)))
    code = main([verb, "--config", str(path), "--run-dir", str(tmp_path / "run"), "--dry-run"])
    said = capsys.readouterr()
    if problem:
        assert code == 2 and problem in said.err
    else:
        assert code == 0 and "# students: 18, 3 methods by 3 seeds on train_1, train_2; more where" in said.out
    assert not (tmp_path / "run").exists()
