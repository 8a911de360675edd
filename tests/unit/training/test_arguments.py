"""Every train argument of ultralytics is obeyed here or refused; a new version's new ones must be decided."""

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data import augment, dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.loss import v8DetectionLoss, v8OBBLoss

from softlabel.config import Model, Train
from softlabel.errors import RecipeError
from softlabel.recipe_file import RECIPES, load_recipe
from softlabel.training.arguments import OBEYED, SET_BY_SOFTLABEL, WITHOUT_EFFECT, check_models, check_train_args
from softlabel.training.dataset import TileDataset
from softlabel.training.targets import Target
from softlabel.training.trainer import SoftLabelTrainer

KNOWN = {*DEFAULT_CFG_DICT, "save_dir", "augmentations"}  # these two are no defaults, but args.yaml may have them
DEFAULTS = {"save_dir": "runs/train", "augmentations": None, **DEFAULT_CFG_DICT}
OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.5}


def other_than(value):
    """A value of the same type that is not the default."""
    return OTHER[type(value)](value) if type(value) in OTHER else "other"


def check(args, model="yolov5n.yaml"):
    check_train_args(args, "train.student", model)


def test_every_argument_is_of_one_kind():
    kinds = (OBEYED, set(SET_BY_SOFTLABEL), set(WITHOUT_EFFECT))
    assert sorted(name for kind in kinds for name in kind) == sorted(KNOWN)


@pytest.mark.parametrize("name", sorted(SET_BY_SOFTLABEL))
def test_what_softlabel_sets_is_refused(name):
    for value in (DEFAULTS[name], other_than(DEFAULTS[name])):
        with pytest.raises(RecipeError, match=rf"train\.student\.args: {name} is not for a recipe \(.+\): remove it$"):
            check({"epochs": 3, name: value})


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_has_no_effect_is_refused_unless_it_is_the_default(name):
    check({name: DEFAULTS[name]})  # as a pasted args.yaml has it
    with pytest.raises(RecipeError, match=rf"train\.student\.args: {name} has no effect \(.+\): remove it$"):
        check({name: other_than(DEFAULTS[name])})


def test_rect_is_refused():
    with pytest.raises(
        RecipeError, match=r"args: rect has no effect \(tiles of one batch are padded to a square\): remove it"
    ):
        check({"rect": True})


def sources():
    """The code that reads arguments when a model trains: the trainer with our overrides, its data set and losses."""
    parts = (augment.v8_transforms, dataset.YOLODataset, v8DetectionLoss, v8OBBLoss)
    return "\n".join([*map(inspect.getsource, parts), *(method_source(name) for name in dir(SoftLabelTrainer))])


def method_source(name):
    """A method, with those that it calls by super()."""
    code = ""
    for owner in SoftLabelTrainer.__mro__:
        if inspect.isfunction(vars(owner).get(name)):
            found = inspect.getsource(vars(owner)[name])
            code += found
            if f"super().{name}(" not in found:
                break
    return code


SOURCES = sources()
# Read there, but not in a way that a detection of boxes knows, or only to be handed to what is replaced here.
READ_IN_VAIN = {
    "rect": "switched off beside other GPUs; the data set here has none",
    "save_period": "in a save_model that is replaced",
    "max_det": "of a validator that is replaced",
    "augmentations": "a list of Albumentations, which a recipe has no words for",
    "quantize": "quantization-aware training, which the weights files here have no words for",
    "distill_model": "refused",
    "copy_paste": "of segments",
    "copy_paste_mode": "of segments",
    "overlap_mask": "of masks",
    "mask_ratio": "of masks",
}


@pytest.mark.parametrize("name", sorted(KNOWN - set(SET_BY_SOFTLABEL)))
def test_what_is_obeyed_is_read_and_nothing_else(name):
    is_read = bool(re.search(rf"\b(args|hyp|h)(\.{name}\b|\.get\(\"{name}\")", SOURCES))
    assert is_read == (name in OBEYED or name in READ_IN_VAIN)


def settings_of(value, depth=0):
    """All numbers, texts and flags inside an object, by their path."""
    if isinstance(value, str | int | float | bool | tuple | type(None)):
        return value
    if isinstance(value, list):
        return [settings_of(item, depth + 1) for item in value]
    if depth > 6 or isinstance(value, TileDataset | np.ndarray) or not hasattr(value, "__dict__"):
        return type(value).__name__
    return {key: settings_of(item, depth + 1) for key, item in vars(value).items()}


def tiles(**args):
    """The training set as the trainer makes it."""
    hyp = get_cfg(overrides={"cache": "ram", **args})
    target = Target({"tile_id": "a", "window": (0, 0, 64, 64)}, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    read = lambda row: np.zeros((64, 64, 3), np.uint8)  # noqa: E731
    data = {"names": {0: "car"}, "nc": 1, "channels": 3}
    return TileDataset([target] * 3, read, imgsz=hyp.imgsz, augment=True, hyp=hyp, cache=hyp.cache or None, data=data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0.33) for name in ("hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear")),
        *((name, 0.25) for name in ("flipud", "fliplr", "bgr", "mosaic", "mixup", "cutmix")),
        ("perspective", 0.0005),
        ("imgsz", 96),
    ],
)
def test_augmentation_is_as_the_recipe_says(name, value):
    usual, changed = (settings_of(tiles(**args).transforms) for args in ({}, {name: value}))
    assert usual != changed and str(value) in str(changed)


def test_tiles_are_kept_where_the_recipe_says():
    assert all(image is not None for cache in ("ram", True, "disk") for image in tiles(cache=cache).ims)
    assert tiles(cache=False).ims == [None] * 3


@pytest.mark.parametrize(
    ("args", "model", "message"),
    [
        ({"epoch": 3}, "yolov5n.yaml", r"args: epoch is no ultralytics train argument: remove it"),
        ({"epochs": "many"}, "yolov5n.yaml", "epochs"),
        *(({"batch": value}, "yolov5n.yaml", r"args\.batch is .*: give the number") for value in (-1, 0.7, 8.0, True)),
        *(({"batch": float(value)}, "yolov5n.yaml", "batch") for value in ("inf", "nan")),
        *(({"cache": value}, "yolov5n.yaml", r"args\.cache is .*: give ram, disk or false") for value in ("foo", 1)),
        *(({"imgsz": value}, "yolov5n.yaml", "imgsz") for value in (0, 100, 640.5, "big", [640, 480])),
        *(({"freeze": value}, "yolov5n.yaml", "freeze") for value in ("10", -1, 1.5, True)),
        ({"optimizer": "adamx"}, "yolov5n.yaml", r"args\.optimizer is adamx: give one of SGD, .*auto"),
        ({"lr0": 0.5}, "yolov5n.yaml", "lr0 has no effect under optimizer: auto"),
        ({"momentum": 0.5, "optimizer": "Auto"}, "yolov5n.yaml", "momentum has no effect under optimizer: auto"),
        ({"warmup_momentum": 0.5, "optimizer": "AdamW"}, "yolov5n.yaml", "warmup_momentum has no effect with AdamW"),
        ({"angle": 0.5}, "yolo11n.yaml", r"args: angle is for a loss that yolo11n\.yaml lacks: it finds upright boxes"),
        ({"dfl": 1.0}, "yolov5n-anchor.yaml", r"args: dfl is for a loss that yolov5n-anchor\.yaml lacks"),
        ({"cls_pw": 0.5}, "yolov5n-anchor.yaml", r"args: cls_pw is for a loss that yolov5n-anchor\.yaml lacks"),
        ({"rect": True, "plots": True}, "yolov5n.yaml", r"rect has no effect .*; plots is not for .*: remove them"),
    ],
)
def test_values_that_do_not_go_are_named(args, model, message):
    with pytest.raises(RecipeError, match=message):
        check(args, model)


def test_what_is_right_passes():
    check({"epochs": 3, "optimizer": "SGD", "lr0": 0.5, "mosaic": 0.5, "cache": "ram", "dfl": 1.0, "cls_pw": 0.5})
    check({"cache": "disk"})
    check({"warmup_momentum": 0.5, "optimizer": "SGD", "freeze": [0, "23.cv2"], "imgsz": 96})
    check({name: DEFAULTS[name] for name in KNOWN - set(SET_BY_SOFTLABEL)}, "yolov5n-anchor.yaml")


def test_the_optimizer_is_as_the_recipe_says():
    """What it is refused for under ``auto`` and with Adam it does elsewhere."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    def groups(**args):
        trainer = SimpleNamespace(args=get_cfg(overrides=args), data={"nc": 3})
        found = DetectionTrainer.build_optimizer(
            trainer, model, name=trainer.args.optimizer, lr=trainer.args.lr0, momentum=trainer.args.momentum,
            decay=trainer.args.weight_decay, iterations=100,
        )  # fmt: skip
        return type(found).__name__, [
            {key: value for key, value in group.items() if key != "params"} for group in found.param_groups
        ]

    assert groups() == groups(lr0=0.5, momentum=0.1)
    name, (first, *_) = groups(optimizer="SGD", lr0=0.5, momentum=0.1)
    assert (name, first["lr"], first["momentum"]) == ("SGD", 0.5, 0.1)
    name, (first, *_) = groups(optimizer="AdamW", lr0=0.5, momentum=0.1)
    assert (name, first["lr"], first["betas"][0], "momentum" in first) == ("AdamW", 0.5, 0.1, False)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_along_pass(path):
    train = load_recipe(path).train
    for model in (train.teacher, train.student):
        check(model.args, model.model)


@pytest.mark.parametrize(
    ("name", "finds"),
    [
        ("yolo11n-seg.yaml", "masks"),
        ("yolo26n-pose.yaml", "keypoints"),
        ("yolov8n-cls.yaml", "classes of whole images"),
        ("yolo26n-sem.yaml", "classes of pixels"),
        ("yolo26n-depth.yaml", "depths"),
        ("rtdetr-l.yaml", r"boxes of another kind \(RTDETRDecoder\)"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_of_another_task_is_refused_before_anything_is_done(name, finds, role):
    with pytest.raises(RecipeError, match=f"{name} is a model for {finds}, which is not trained here: give a"):
        check_models(Train(**{role: Model(model=name)}))


@pytest.mark.parametrize("name", ["yolov8n-obb.yaml", "yolo26n-obb.yaml"])
def test_models_of_rotated_boxes_are_trained_with_a_loss_of_their_angles(name):
    check_models(Train(student=Model(model=name, args={"angle": 0.5})))


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match=r"no model yolo99n\.yaml"):
        check_models(Train(student=Model(model="yolo99n.yaml")))
