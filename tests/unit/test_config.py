"""Recipes: what is refused, in words that say what to do."""

from pathlib import Path

import pytest
import yaml

from softlabel.config import Recipe, default_iou
from softlabel.errors import RecipeError
from softlabel.recipe_file import RECIPES, dump_recipe, find_recipe, load_recipe, with_values
from softlabel.records import Nms

MINIMAL = {"name": "x", "classes": ["car"], "tiles": {"scenes": "images"}}


@pytest.fixture
def recipe_file(tmp_path):
    def write(data):
        path = tmp_path / "recipe.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return path

    return write


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_project_load_and_survive_saving(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(saved) == recipe


def test_a_recipe_of_the_package_goes_by_its_name_where_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()  # results of an earlier run, perhaps
    for name in ("demo", "demo.yaml", "paper", "paper.yaml"):
        assert find_recipe(name) == RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(MINIMAL))
    assert load_recipe("demo.yaml").name == "x" and load_recipe("demo").name == "demo"
    for name in ("gone", "gone.yaml", "jobs/demo.yaml", "./paper.yaml", str(tmp_path / "paper.yaml")):
        with pytest.raises(
            RecipeError, match=rf"no recipe at {name}: .* demo, methods, overhead, owlvit, paper, synthetic$"
        ):
            load_recipe(name)


def test_the_paper_s_recipe_keeps_mosaic_and_its_own_optimizer():
    args = load_recipe("paper").train.student.args
    assert (args["epochs"], args["close_mosaic"], args["optimizer"], args["lr0"]) == (3, 0, "SGD", 0.01)
    assert (args["imgsz"], args["batch"]) == (640, 16)


def test_nms_is_what_the_model_was_published_with_unless_the_recipe_says_otherwise(recipe_file):
    label = load_recipe(recipe_file(MINIMAL)).label
    assert (default_iou("yolov5n.yaml"), default_iou("yolov5n-anchor.yaml")) == (0.7, 0.45)
    assert (default_iou({"nc": 3}), default_iou({"nc": 3, "anchors": [[]]})) == (0.7, 0.45)
    assert label.nms(0.45) == Nms(0.01, 0.45, 1000)
    given = load_recipe(recipe_file({**MINIMAL, "label": {"iou": 0.6, "floor": 0.1, "max_det": 7}})).label
    assert given.nms(0.45) == Nms(0.1, 0.6, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": {}}, "tile: unknown key"),
        ({"tiles": {"scenes": "a", "size": 3}}, r"tiles\.size: unknown key"),
        ({"tiles": {}}, "give one of tiles.scenes"),
        ({"tiles": {"scenes": "a", "synthetic": {}}}, "give one of tiles.scenes"),
        ({"tiles": {"scenes": "a", "overlap_px": 700}}, "overlap_px=700 must be below size_px=640"),
        ({"tiles": {"scenes": "a", "split": {"test": 0.5}}}, "must be 1, they are 1.3"),
        ({"classes": ["car", "car"]}, "classes named twice"),
        ({"classes": ["all"]}, "cannot be named `all`"),
        ({"classes": []}, "classes"),
        ({"label": {"floor": 2}}, r"label\.floor"),
        (
            {"tiles": {"scenes": "a", "truth": {"format": "xview", "path": "t", "mapping": {18: "lorry"}}}},
            "mapping names lorry, which `classes` does not",
        ),
    ],
)
def test_what_cannot_be_run_is_named(recipe_file, change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file({**MINIMAL, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\t", "just words"])
def test_files_that_are_no_recipe(recipe_file, text):
    with pytest.raises(RecipeError):
        load_recipe(recipe_file(text))


def test_set_changes_one_value_and_makes_sections(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL), ["label.floor=0.05", "train.student.args.epochs=7", "seed=3"])
    assert (recipe.label.floor, recipe.train.student.args, recipe.seed) == (0.05, {"epochs": 7}, 3)
    assert recipe.train.teacher.args == {}


def test_set_on_one_side_of_a_yaml_alias_leaves_the_other(recipe_file):
    text = yaml.safe_dump(MINIMAL) + "train:\n  teacher: &m {args: {epochs: 5}}\n  student: *m\n"
    recipe = load_recipe(recipe_file(text), ["train.student.args.epochs=9"])
    assert (recipe.train.teacher.args["epochs"], recipe.train.student.args["epochs"]) == (5, 9)


@pytest.mark.parametrize("override", ["floor", "=3", "name.sub=3", "label.floor=[", "label.nope=1"])
def test_wrong_overrides_are_named(recipe_file, override):
    with pytest.raises(RecipeError):
        load_recipe(recipe_file(MINIMAL), [override])


def test_recipes_cannot_be_changed(recipe_file):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file(MINIMAL)).name = "other"


def test_every_key_is_documented():
    documented = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()

    def keys(model):
        for name, field in model.model_fields.items():
            yield name
            for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if hasattr(part, "model_fields"):
                    yield from keys(part)

    assert [key for key in keys(Recipe) if f"`{key}`" not in documented] == []


def test_the_key_of_earlier_recipes_names_the_new_one():
    with pytest.raises(RecipeError, match=r"label\.owlvit is label\.open_vocabulary now"):
        load_recipe("demo", ["label.owlvit.model=google/owlvit-base-patch32"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["flipr"], r"label\.augment\.0: 'flipr' is no view: give fliplr, flipud, rot90 or a factor above 0\.1"),
        ([12], r"label\.augment\.0: 12 is no view"),
        ("fliplr", r"label\.augment: 'fliplr' is no list: give one, as \[fliplr\]"),
    ],
)
def test_a_view_that_is_none_is_named(value, says):
    with pytest.raises(RecipeError, match=says):
        with_values(load_recipe("demo"), {"label.augment": value})
