"""Ways to train, compared on a real Ray: one launch, several students at a time, taken up where it stopped."""

import json

import pytest
from conftest import tiny_recipe

from softlabel.errors import RecipeError
from softlabel.store import file_digest, is_done, read_json, summary
from softlabel.workflows.compare import compare

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1200)]


def recipe_of(weights, methods, **more):
    train = tiny_recipe().train.model_dump()
    return tiny_recipe(
        label={"weights": str(weights)},
        train={**train, "threshold": 0.05},
        compare={"seeds": 2, "splits": ["train_2"], "methods": methods, **more},
        execution={"cpus_per_worker": 1.5},  # two at a time: starting a group takes a minute
    )


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """Six students that train, two of them again, and two that cannot."""
    run_dir = tmp_path_factory.mktemp("compare")
    methods = {
        "all+of+it": {
            "train.student.weights": str(weights),  # so that it finds something to label, after so few epochs
            "train.student.args.lr0": 1e-4,
            "train.soft.class_targets": "vector",
            "train.soft.ignore_above": 0.03,
            "train.soft.localisation_power": 1.0,
            "train.soft.supplement": {"share": 0.3},
            "train.soft.soft_teacher": {"threshold": 0.05, "burn_in": 0.5},
            "train.soft.rounds": 2,
        },
        "absurd": {"train.threshold": 1.0},
    }
    recipe = recipe_of(weights, methods, drop=0.5)
    return recipe, run_dir, compare(recipe, run_dir)


def test_every_method_has_its_students_and_one_that_fails_stops_no_other(compared):
    _, run_dir, results = compared
    assert [(row["method"], row["students"]) for row in results["rows"]] == [
        ("plain", 2),
        ("all+of+it", 2),
        ("truth", 2),
    ]
    assert set(results["failed"]) == {"absurd_train_2_seed0", "absurd_train_2_seed1"}
    assert all("no soft label of" in reason for reason in results["failed"].values())
    assert json.loads((run_dir / "compare.json").read_text())["rows"] == results["rows"]
    page = (run_dir / "compare.html").read_text()
    assert "all+of+it" in page and "train.soft.ignore_above: 0.03" in page


def test_students_differ_by_method_and_seed_alone(compared):
    _, run_dir, results = compared
    folders = {path.name.rsplit("-", 1)[0]: path for path in run_dir.glob("train-*_seed?-*") if is_done(path)}
    said = {name: summary(path) for name, path in folders.items()}
    assert len(said) == 6
    for seed in (0, 1):
        plain, soft = said[f"train-plain_train_2_seed{seed}"], said[f"train-all+of+it_train_2_seed{seed}"]
        assert plain["seed"] == soft["seed"] == seed
        assert plain["train_tiles"] == soft["train_tiles"] - soft["supplement_tiles"] < soft["train_tiles"]
        assert plain["soft"] == {} and soft["soft"]["class_targets"] == "vector" and "rounds" not in soft["soft"]
    labels = {(row["method"], row["train_set"], row["seed"]): row["boxes"] for row in results["labels"]}
    assert set(labels) == {(name, "train_2", seed) for name in ("plain", "all+of+it", "absurd") for seed in (0, 1)}
    (boxes,) = set(labels.values())  # of a teacher that was given: the same for all
    assert 0 < results["train_boxes"]["plain"]["train_2"] < boxes


def test_a_student_labels_its_tiles_and_learns_again_from_its_weights(compared):
    """The better of its two rounds is judged, and what the later one learned from is its own labels."""
    _, run_dir, results = compared
    for seed in (0, 1):
        name = f"all+of+it_train_2_seed{seed}"
        (first,) = run_dir.glob(f"train-{name}-*")
        (second,) = run_dir.glob(f"train-{name}_round2-*")
        (store,) = run_dir.glob(f"label-train_set_by_{name}-*")
        asked = summary(first)["train_tiles"] - summary(first)["supplement_tiles"]
        assert is_done(second) and summary(store)["requested"] == asked and summary(second)["seed"] == seed
        assert read_json(store / "store.json")["teacher"]["weights"] == file_digest(first / "weights.safetensors")
        is_better = summary(second)["val_map50"] > summary(first)["val_map50"]
        (judged,) = run_dir.glob(f"label-{name}_round2-*" if is_better else f"label-{name}-*")
        assert is_done(judged)
    assert not list(run_dir.glob("train-*_round3-*"))
    assert results["methods"]["all+of+it"]["train.soft.rounds"] == 2


def test_done_once_it_is_not_done_again(compared):
    recipe, run_dir, results = compared
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("train-*/weights.safetensors")}
    again = compare(recipe, run_dir)
    assert again["rows"] == results["rows"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ({"up": {"train.soft.ignore_above": 0.5}}, "compare.methods.up: train.soft.ignore_above is 0.5 for car"),
        ({"no": {"train.soft.weigh": 1}}, "compare.methods.no: train.soft.weigh: unknown key"),
        ({"no": {"train.student.args.rect": True}}, "compare.methods.no: train.student.args: rect has no effect"),
    ],
)
def test_a_method_that_makes_no_student_is_named_before_anything_is_done(weights, tmp_path, methods, problem):
    with pytest.raises(RecipeError, match=problem):
        compare(recipe_of(weights, methods), tmp_path)
    assert not list(tmp_path.iterdir())


def test_plain_students_are_plain(weights, tmp_path):
    recipe = recipe_of(weights, {})
    train = recipe.train.model_copy(update={"soft": recipe.train.soft.model_copy(update={"smoothing": 0.5})})
    with pytest.raises(RecipeError, match="move it to a method"):
        compare(recipe.model_copy(update={"train": train}), tmp_path)
