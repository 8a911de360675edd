"""The command line's verbs and their flags: the same ones for every verb that takes a recipe."""

import argparse
import math
import re

import softlabel
from softlabel.storage import location

_RECIPE_VERBS = {
    "tile": "cut scenes and truth into tiles",
    "label": "label tiles with label.weights, keeping every box above the floor",
    "train": "train train.student on a split's truth or on its soft labels",
    "evaluate": "judge the labels of `softlabel label` against a split's truth",
    "calibrate": "fit what the labels' scores are worth, on a split with truth",
    "experiment": "all of it: teachers, soft labels, students, numbers, report",
    "search": "find the threshold that makes the best student, and how sure that is",
    "compare": "train students plainly and in other ways, and say which way is better",
    "categorize": "look for every class of a vocabulary, and report what is in the imagery",
    "demo": "the experiment on made-up scenes, minutes on a laptop",
}
WITHOUT_RAY = ("tile", "evaluate", "calibrate")
"""Verbs with a recipe that do not start Ray."""
_STORE = "a label-*, fused-* or subtypes-* folder of a run"


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs and flags."""
    top = argparse.ArgumentParser(prog="softlabel", description=softlabel.__doc__)
    top.add_argument("--version", action="version", version=softlabel.__version__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, purpose in _RECIPE_VERBS.items():
        verb = verbs.add_parser(name, help=purpose, description=purpose)
        default = "demo" if name == "demo" else None
        purpose = "the recipe: a YAML file, or the name of one that comes along (demo, paper, ...)"
        verb.add_argument("--config", default=default, required=default is None, metavar="RECIPE", help=purpose)
        verb.add_argument(
            "--run-dir", type=location, metavar="DIR", help="where results go (default: runs/<name of the recipe>)"
        )
        verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value")
        verb.add_argument("--dry-run", action="store_true", help="print the plan and stop")
        if name not in WITHOUT_RAY:
            _add_verbose(verb)
        if name == "label":
            _add_retry_rejected(verb)
        if name == "categorize":
            purpose = "text file: a class name per line, or `name: phrasing, phrasing`"
            verb.add_argument("--vocabulary", type=location, required=True, metavar="FILE", help=purpose)
            verb.add_argument("--threshold", type=_share, default=0.1, help="boxes scoring above it (default: 0.1)")
        if name == "search":
            purpose = "time limit for the search, such as 8h or 1h30m, not counting teacher and labels (default: none)"
            verb.add_argument("--budget", type=_seconds, metavar="TIME", help=purpose)
            verb.add_argument("--resume", action="store_true", help="go on with a search that is there")
    purpose = "say what a weights file is, and what can be done with it, without running any code in it"
    verb = verbs.add_parser("describe", help=purpose, description=purpose)
    verb.add_argument("weights", metavar="WEIGHTS", help="a .pt, .safetensors or .onnx, or a model of transformers")
    purpose = "say how far a run is, while it runs and afterwards, on any machine that sees its folder"
    verb = verbs.add_parser("status", help=purpose, description=purpose)
    verb.add_argument("run_dir", type=location, metavar="RUN-DIR", help="the run's folder, as given to --run-dir")
    _add_import_weights(verbs)
    _add_show(verbs)
    _add_export(verbs)
    _add_fuse(verbs)
    _add_subtype(verbs)
    return top


def _add_verbose(verb: argparse.ArgumentParser) -> None:
    purpose = "print what Ray and other libraries say instead of writing it to the log"
    verb.add_argument("--verbose", action="store_true", help=purpose)


def _add_retry_rejected(verb: argparse.ArgumentParser) -> None:
    purpose = "read again the tiles whose failure may have been transient"
    verb.add_argument("--retry-rejected", action="store_true", help=purpose)


def _add_import_weights(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    purpose = "turn a checkpoint of ultralytics or YOLOv5 (.pt) into safetensors, without running any code in it"
    verb = verbs.add_parser("import-weights", help=purpose, description=purpose)
    purpose = "a .pt file; with --model also a bare state_dict, as .pt or .safetensors"
    verb.add_argument("checkpoint", type=location, metavar="WEIGHTS", help=purpose)
    verb.add_argument("--output", type=location, help="where to (default: beside it, as .safetensors)")
    verb.add_argument("--model", metavar="YAML", help="for a bare state_dict: its model, such as yolo11n.yaml")
    verb.add_argument("--classes", metavar="NAME,NAME", help="for a bare state_dict: the model's classes, in its order")
    purpose = "for a bare state_dict: longer side of the training images, in pixels (default: 640)"
    verb.add_argument("--imgsz", type=int, default=640, help=purpose)


def _add_show(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    purpose = "count a store of soft labels, and draw its most doubtful tiles for a look and for correction"
    verb = verbs.add_parser("show", help=purpose, description=purpose)
    verb.add_argument("store", type=location, metavar="STORE", help=_STORE)
    verb.add_argument("--output", type=location, metavar="DIR", help="where to (default: STORE/show)")
    verb.add_argument("--doubtful", type=int, default=24, metavar="N", help="how many tiles to draw (default: 24)")


def _add_export(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    purpose = "write a store as GeoParquet or GeoJSON (per scene, each object once), or as a data set of tiles"
    verb = verbs.add_parser("export", help=purpose, description=purpose)
    verb.add_argument("store", type=location, metavar="STORE", help=_STORE)
    formats = ("geoparquet", "geojson", "coco", "yolo", "yolo-obb", "dota")
    verb.add_argument("--format", choices=formats, default="geoparquet")
    verb.add_argument(
        "--output", type=location, metavar="DIR", help="where to (default: beside it, export-FORMAT-STORE)"
    )
    _add_which_boxes(verb, threshold=0.3, iou=0.5)
    purpose = "what a scene keeps of several boxes of one object: the best (default), or their mean"
    verb.add_argument("--merge", choices=("nms", "wbf"), default="nms", help=purpose)
    _add_verbose(verb)


def _add_fuse(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    purpose = "fuse the labels of several teachers over the same tiles into one store"
    verb = verbs.add_parser("fuse", help=purpose, description=purpose)
    verb.add_argument(
        "stores", type=location, nargs="+", metavar="STORE", help="label-*, fused-* or subtypes-* folders of a run"
    )
    verb.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per store (default: all 1)")
    _add_which_boxes(verb, threshold=0.05, iou=0.55)
    _add_verbose(verb)


def _add_subtype(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    purpose = "split a class of a store into finer ones (red cars, white cars) by what its boxes show"
    verb = verbs.add_parser("subtype", help=purpose, description=purpose)
    verb.add_argument("store", type=location, metavar="STORE", help=_STORE)
    verb.add_argument("--class", dest="split_class", required=True, metavar="NAME", help="the class to split")
    purpose = "a box's pixel colour, an image classifier's classes, or prompts that a CLIP or SigLIP compares it with"
    verb.add_argument("--by", choices=("colour", "classifier", "prompts"), default="colour", help=purpose)
    purpose = "of classifier and prompts: a folder of transformers with .safetensors, or a name on the hub"
    verb.add_argument("--model", metavar="MODEL", help=purpose)
    purpose = "of prompts: text file, a finer class per line, or `name: phrasing, phrasing`"
    verb.add_argument("--prompts", type=location, metavar="FILE", help=purpose)
    _add_retry_rejected(verb)
    _add_verbose(verb)


def _add_which_boxes(verb: argparse.ArgumentParser, threshold: float, iou: float) -> None:
    verb.add_argument(
        "--threshold", type=_share, default=threshold, help="boxes scoring above it (default: %(default)s)"
    )
    purpose = "boxes of the same class whose IoU is above it are one object (default: %(default)s)"
    verb.add_argument("--iou", type=_share, default=iou, help=purpose)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"{text} is no time such as 8h, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + seconds


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value
