"""One table says which file runs which detector, and what a recipe leaves unsaid for it."""

import importlib
import sys
import types
from pathlib import Path

import pytest
from conftest import CLASSES, tiny_recipe

from softlabel.detectors import families
from softlabel.detectors.families import FAMILIES, Family, load
from softlabel.detectors.teachers import recipe_teacher, weights_teacher

TINY_OWLVIT = Path(__file__).parents[2] / "assets" / "tiny-owlvit"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_file_that_loads(name):
    assert callable(importlib.import_module(f"softlabel.detectors.{FAMILIES[name].module}").load)


def open_vocabulary(**label):
    prompts = {name: [name] for name in CLASSES}
    return tiny_recipe(label={"open_vocabulary": {"model": str(TINY_OWLVIT), "prompts": prompts}, **label})


def test_an_open_vocabulary_teacher_is_what_its_folder_says():
    teacher = recipe_teacher(open_vocabulary())
    assert (teacher.family, teacher.num_classes, teacher.engine) == ("owlvit", 3, "pytorch")
    assert teacher.nms.iou == 0.5  # every patch of an object answers
    assert set(teacher.fingerprint["versions"]) == {"torch", "torchvision", "transformers"}
    assert recipe_teacher(open_vocabulary(iou=0.6)).nms.iou == 0.6


def test_a_trained_teacher_is_what_its_weights_say(weights, anchor_weights):
    recipe = tiny_recipe(label={"engine": "pytorch"})
    teacher = weights_teacher(recipe, weights)
    assert (teacher.family, teacher.num_classes, teacher.imgsz, teacher.nms.iou) == ("yolo", 3, 128, 0.7)
    assert set(teacher.fingerprint["versions"]) == {"torch", "torchvision", "ultralytics"}
    assert weights_teacher(recipe, anchor_weights).nms.iou == 0.45


def test_a_new_family_is_a_file_and_a_line(monkeypatch, weights):
    given = {}
    module = types.ModuleType("softlabel.detectors.new")
    module.load = lambda teacher, **options: given.update(options) or teacher.weights
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(families.FAMILIES, "new", Family("new", ("torch",)))
    teacher = weights_teacher(tiny_recipe(label={"engine": "pytorch_compile", "precision": "bfloat16"}), weights)
    new = families.Teacher(**{**vars(teacher), "family": "new"})
    assert load(new, threads=2, batch_size=3) == weights
    assert given == {"engine": "pytorch_compile", "precision": "bfloat16", "threads": 2, "batch_size": 3}
