"""ultralytics train arguments in a recipe: what has an effect passes, what has none is refused by name.

An argument that is silently ignored is a wrong experiment. But people paste whole args.yaml files: a value that is
ultralytics' own default changes nothing there either, and passes.
"""

from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

from softlabel.config import is_anchor_based
from softlabel.errors import RecipeError

SET_BY_SOFTLABEL = {
    **dict.fromkeys(("data", "task", "mode", "fraction", "split"), "tiles and splits have keys of their own"),
    **dict.fromkeys(("classes", "single_cls"), "the recipe's `classes` say it"),
    **dict.fromkeys(("model", "pretrained", "seed"), "model, weights and seed have keys of their own"),
    **dict.fromkeys(("device", "compile"), "devices follow from `execution`"),
    **dict.fromkeys(("project", "name", "exist_ok", "resume", "save", "plots"), "results go to the run folder"),
    "val": "every epoch is validated",
    "time": "set epochs, or `softlabel search --budget`",
}
"""Arguments that are refused whatever their value, with what to use instead."""

OBEYED = frozenset(
    {"epochs", "patience", "batch", "imgsz", "cache", "workers", "optimizer", "deterministic", "cos_lr", "close_mosaic"}
    | {"amp", "freeze", "multi_scale", "channels_last", "lr0", "lrf", "momentum", "weight_decay", "nbs"}
    | {"warmup_epochs", "warmup_momentum", "warmup_bias_lr", "box", "cls", "cls_pw", "dfl"}
    | {"hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr"}
    | {"mosaic", "mixup", "cutmix"}
)
"""Arguments that do what ultralytics says they do."""

_NOT_HERE = {
    "rect": "tiles of one batch are padded to a square",
    "save_period": "the state of every epoch is kept until the next",
    "cls_remap": "a head starts anew where its shape differs",
    "verbose": "use --verbose",
    "quantize": "label.precision says how labels are computed",
    "conf": "label.floor says it, for validation too",
    "iou": "label.iou says it, for validation too",
    "max_det": "label.max_det says it, for validation too",
    "agnostic_nms": "NMS is class-wise",
    "copy_paste": "boxes have no outlines to copy by",
    "copy_paste_mode": "boxes have no outlines to copy by",
    "distill_model": "students learn from stored labels, no teacher runs beside them",
    "dis": "students learn from stored labels, no teacher runs beside them",
}
_OTHER_TASKS = (
    *("overlap_mask", "mask_ratio", "retina_masks", "dropout", "pose", "kobj", "rle", "angle", "dlog", "dgrad", "dlam"),
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


def check_train_args(args: dict[str, Any], where: str, model: str) -> None:
    """Refuse train arguments that ultralytics does not know, softlabel sets itself, or that have no effect.

    Args:
        args: As the recipe has them.
        where: The recipe key above them, for the message.
        model: The model's name: those with anchors have other losses.

    Raises:
        RecipeError: Naming the argument.
    """
    for name, value in args.items():
        if name in SET_BY_SOFTLABEL:
            raise RecipeError(f"{where}.args.{name} is set by softlabel: remove it ({SET_BY_SOFTLABEL[name]})")
        if name not in DEFAULT_CFG_DICT:
            raise RecipeError(f"{where}.args.{name} is no ultralytics train argument: correct or remove it")
        if name in WITHOUT_EFFECT and value != DEFAULT_CFG_DICT[name]:
            raise RecipeError(f"{where}.args.{name} has no effect: remove it ({WITHOUT_EFFECT[name]})")
        if name in _NOT_WITH_ANCHORS and is_anchor_based(model) and value != DEFAULT_CFG_DICT[name]:
            losses = "its losses are box, obj and cls"
            raise RecipeError(f"{where}.args.{name}: {model} has no such loss ({losses}): remove it")
    try:
        checked = get_cfg(overrides=args)
    except (TypeError, ValueError, SyntaxError) as error:
        raise RecipeError(f"{where}.args: {' '.join(str(error).split())}") from None
    if checked.batch < 1 or checked.batch != int(checked.batch):
        raise RecipeError(f"{where}.args.batch is {checked.batch}: give the number of tiles, for all workers together")
    if checked.cache == "disk":
        raise RecipeError(f"{where}.args.cache: disk would write beside the scenes: set it to ram, or remove it")
