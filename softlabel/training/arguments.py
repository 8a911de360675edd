"""ultralytics train arguments in a recipe: what has an effect passes, what has none is refused by name.

An argument that is silently ignored is a wrong experiment. But people paste whole args.yaml files, so an argument
without effect passes if it has ultralytics' own default, which changes nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

from softlabel.config import Recipe, Threshold, Train, is_anchor_based
from softlabel.detectors.weights import check_trainable, finds_rotated
from softlabel.errors import RecipeError

SET_BY_SOFTLABEL = {
    **dict.fromkeys(("data", "task", "mode", "fraction", "split"), "tiles and splits have keys of their own"),
    **dict.fromkeys(("classes", "single_cls"), "the recipe's `classes` say it"),
    **dict.fromkeys(("model", "pretrained", "seed"), "model, weights and seed have keys of their own"),
    **dict.fromkeys(("project", "name", "save_dir", "exist_ok", "save", "plots"), "results go to the run folder"),
    "device": "devices follow from `execution`",
    "compile": "models are trained as they are, uncompiled",
    "resume": "the same command goes on where it stopped",
    "val": "every epoch is validated",
    "time": "set epochs, or `softlabel search --budget`",
}
"""Arguments that are refused whatever their value, with what to use instead."""

OBEYED = frozenset(
    {"epochs", "patience", "batch", "imgsz", "cache", "workers", "optimizer", "deterministic", "cos_lr", "close_mosaic"}
    | {"amp", "freeze", "multi_scale", "channels_last", "lr0", "lrf", "momentum", "weight_decay", "nbs"}
    | {"warmup_epochs", "warmup_momentum", "warmup_bias_lr", "box", "cls", "cls_pw", "dfl", "angle"}
    | {"hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr"}
    | {"mosaic", "mixup", "cutmix"}
)
"""Arguments that do what ultralytics says they do."""

_NOT_HERE = {
    "rect": "tiles of one batch are padded to a square",
    "save_period": "the best weights are kept, and no others",
    "cls_remap": "a head of another shape is trained from scratch",
    "augmentations": "ultralytics' own augmentations have arguments of their own",
    "verbose": "use --verbose",
    "quantize": "label.precision says how labels are computed",
    "conf": "label.floor says it, for validation too",
    "iou": "label.iou says it, for validation too",
    "max_det": "label.max_det says it, for validation too",
    "agnostic_nms": "NMS is always per class",
    "copy_paste": "boxes have no outlines to copy by",
    "copy_paste_mode": "boxes have no outlines to copy by",
    "distill_model": "students learn from stored labels, no teacher runs beside them",
    "dis": "students learn from stored labels, no teacher runs beside them",
}
_OTHER_TASKS = (
    *("overlap_mask", "mask_ratio", "retina_masks", "dropout", "pose", "kobj", "rle", "dlog", "dgrad", "dlam"),
    *("auto_augment", "erasing"),
)
_OTHER_MODES = (
    *("profile", "save_json", "dnn", "nms", "source", "vid_stride", "stream_buffer", "visualize", "augment", "embed"),
    *("show", "save_frames", "save_txt", "save_conf", "save_crop", "show_labels", "show_conf", "show_boxes"),
    *("line_width", "format", "optimize", "dynamic", "simplify", "opset", "workspace", "cfg", "tracker"),
)
WITHOUT_EFFECT = {
    **_NOT_HERE,
    **dict.fromkeys(_OTHER_TASKS, "it is for other tasks than detection"),
    **dict.fromkeys(_OTHER_MODES, "it is not for training"),
}
"""Arguments that would change nothing here, with the reason; refused unless they are ultralytics' default."""

_NOT_WITH_ANCHORS = ("dfl", "cls_pw")
_FIXED_BY_AUTO = ("lr0", "momentum", "warmup_bias_lr")
_OPTIMIZERS = ("SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "auto")


def check_train_args(args: dict[str, Any], where: str, model: str) -> None:
    """Refuse train arguments that ultralytics does not know, that softlabel sets itself or that have no effect.

    Args:
        args: As the recipe has them.
        where: The recipe key above them, for the message.
        model: The model's name; models with anchors have other losses.

    Raises:
        RecipeError: Naming each argument to remove, or the first with an invalid value.
    """
    problems = [f"{name} {problem}" for name in args if (problem := _problem(name, args, model))]
    if problems:
        raise RecipeError(f"{where}.args: {'; '.join(problems)}: remove {'it' if len(problems) == 1 else 'them'}")
    try:
        get_cfg(overrides=args)
    except (TypeError, ValueError, SyntaxError) as error:
        raise RecipeError(f"{where}.args: {' '.join(str(error).split())}") from None
    for name, (fits, wanted) in _VALUES.items():
        if name in args and not fits(args[name]):
            raise RecipeError(f"{where}.args.{name} is {args[name]}: give {wanted}")


def check_models(train: Train) -> None:
    """Check a recipe's teacher and student with their arguments, before hours are spent on tiles and labels.

    Raises:
        RecipeError: As for `check_trainable` and for `check_train_args`.
    """
    for role in ("teacher", "student"):
        model = getattr(train, role)
        check_trainable(model.model)
        check_train_args(model.args, f"train.{role}", model.model)


def check_soft(recipe: Recipe, thresholds: Iterable[Threshold], num_classes: int | None = None) -> None:
    """Refuse a ``train.soft`` that the student's loss has no use for, or that contradicts calibration or a threshold.

    Args:
        recipe: The one whose ``train.soft`` is checked.
        thresholds: Those of its students.
        num_classes: The student's number of classes, where its classes are not the recipe's.

    Raises:
        RecipeError: Naming the key.
    """
    soft, model = recipe.train.soft, recipe.train.student.model
    if soft.rounds > 1 and recipe.train.calibration:
        raise RecipeError(
            "train.soft.rounds is above 1, and train.calibration is of the teacher's scores alone: later rounds learn "
            "from a student's labels: remove one of them"
        )
    if (num_classes or len(recipe.classes)) == 1:
        if soft.smoothing:
            raise RecipeError(
                "train.soft.smoothing has no use: with one class there is no other to share with: remove it"
            )
        if soft.class_targets == "vector" and is_anchor_based(model):
            raise RecipeError(
                f"train.soft.class_targets has no use: with one class {model} has no class loss: remove it"
            )
    if soft.ignore_above is None:
        return
    for threshold in thresholds:
        for name in recipe.classes:
            low, high = (one[name] if isinstance(one, dict) else one for one in (soft.ignore_above, threshold))
            if low >= high:
                raise RecipeError(
                    f"train.soft.ignore_above is {low:g} for {name}, not below its threshold of {high:g}: lower it"
                )


def _problem(name: str, args: dict[str, Any], model: str) -> str | None:
    """Why an argument has to be removed; None if it may stay."""
    if name in SET_BY_SOFTLABEL:
        return f"is not for a recipe ({SET_BY_SOFTLABEL[name]})"
    if name not in DEFAULT_CFG_DICT and name not in WITHOUT_EFFECT:
        return "is no ultralytics train argument"
    if args[name] == DEFAULT_CFG_DICT.get(name):
        return None
    if name in WITHOUT_EFFECT:
        return f"has no effect ({WITHOUT_EFFECT[name]})"
    if name in _NOT_WITH_ANCHORS and is_anchor_based(model):
        return f"is for a loss that {model} lacks (it has box, obj and cls)"
    if name == "angle" and not finds_rotated(model):
        return f"is for a loss that {model} lacks: it finds upright boxes"
    optimizer = str(args.get("optimizer", "auto")).lower()
    if name in _FIXED_BY_AUTO and optimizer == "auto":
        return "has no effect under optimizer: auto, which chooses it (or name an optimizer)"
    if name == "warmup_momentum" and optimizer not in ("sgd", "musgd", "rmsprop", "auto"):
        return f"has no effect with {args['optimizer']}, which has no momentum of that kind"
    return None


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _freezes(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return value is None or all(_is_count(one) or (isinstance(value, list) and isinstance(one, str)) for one in listed)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch": (lambda value: _is_count(value, 1), "the number of tiles, for all workers together"),
    "imgsz": (lambda value: _is_count(value, 32) and value % 32 == 0, "a multiple of 32"),
    "cache": (
        lambda value: value is None or isinstance(value, bool) or str(value).lower() in ("ram", "disk"),
        "ram, disk or false",
    ),
    "freeze": (_freezes, "a number of layers, or a list of them"),
    "optimizer": (lambda value: str(value).lower() in map(str.lower, _OPTIMIZERS), f"one of {', '.join(_OPTIMIZERS)}"),
    "workers": (_is_count, "a number of processes"),
    "close_mosaic": (_is_count, "a number of epochs"),
}
"""Checks of values that ultralytics would accept but ignore, or fail on in the workers, and what to give instead."""
