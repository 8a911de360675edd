"""The one file format that weights travel in, and what is built from it.

Weights are safetensors (no code runs on loading), with what is needed to rebuild the model in the file's metadata. A
checkpoint (.pt) is read by softlabel.detectors.checkpoint wherever weights are read.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn
from ultralytics.nn import modules
from ultralytics.nn.tasks import (
    DetectionModel,
    OBBModel,
    RTDETRDetectionModel,
    WorldModel,
    parse_model,
    yaml_model_load,
)

from softlabel.config import is_anchor_based
from softlabel.detectors.checkpoint import WORLD_TEXT, read_checkpoint, read_state_dict
from softlabel.detectors.header import Header, is_checkpoint, open_weights, read_safetensors_header
from softlabel.detectors.yolov5 import TRAIN_DEFAULTS, AnchorDetect, YoloV5, anchor_yaml
from softlabel.errors import RecipeError, WeightsError
from softlabel.store import commit

_TRAINED = {"Detect": DetectionModel, "v10Detect": DetectionModel, "OBB": OBBModel, "OBB26": OBBModel}
_MODELS = {
    **_TRAINED,
    "RTDETRDecoder": RTDETRDetectionModel,
    "WorldDetect": WorldModel,
}
"""From the head that a yaml ends in to the class that runs it, and for some heads trains it."""

_OTHER_TASKS = {
    "Segment": "masks",
    "Pose": "keypoints",
    "Classify": "classes of whole images",
    "SemanticSegment": "classes of pixels",
    "Depth": "depths",
}
"""What the heads of other tasks find; some names end in a number."""

_LAYERS = {*modules.__all__} - {"TorchVision"}  # which downloads weights
_WORLD_EMBEDDING = 512
_MOST_REPEATS = 100
_LARGEST_OUTPUT = 1 << 25
"""Numbers that a layer may make of 256 x 256 pixels; YOLOv3's, the largest of all, make 2 million."""

_WRAPPERS = re.compile(r"^(module\.|model\.)+(?=\d)")
"""The prefixes that DistributedDataParallel, ultralytics' YOLO and DetectionModel each put before a layer's number."""


def save_weights(path: Path, model: DetectionModel, header: Header) -> None:
    """Write a model as safetensors, atomically by rename. Tensors are stored as float32."""
    _save(path, {key: value.float() for key, value in model.state_dict().items()}, header)


def import_weights(source: Path, target: Path) -> Header:
    """Turn a checkpoint of ultralytics or YOLOv5 into safetensors, and say what it holds.

    Raises:
        WeightsError: ``source`` is not such a checkpoint, asks for a name that none needs, or ``target`` exists.
    """
    _check_absent(target)
    header, tensors = read_weights(source)
    _save(target, tensors, header)
    return header


def import_tensors(source: Path, target: Path, model: str, classes: Sequence[str], imgsz: int) -> Header:
    """Turn bare tensors, a state_dict in a .pt or a safetensors file, into weights of a named model.

    Args:
        source: Its keys may begin with ``model.`` and ``module.`` any number of times.
        target: Where to write them.
        model: One of ultralytics' by its yaml name, or yolov5{n,s,m,l,x}-anchor.yaml.
        classes: What it finds, in its order.
        imgsz: Longer side of the images that it was trained on, in pixels.

    Raises:
        WeightsError: ``source`` cannot be read or its tensors do not fit, or ``target`` exists.
        RecipeError: There is no such model.
    """
    _check_absent(target)
    found = read_state_dict(source) if is_checkpoint(source) else _read_tensors(source)
    if found is None:
        raise WeightsError(
            f"{source} is not a bare state_dict: give it without --model and --classes if it holds a whole model"
        )
    tensors = _named_alike(found)
    header = Header(build_model(model, len(classes)).yaml, tuple(classes), imgsz, default_train_args(model))
    _check_fits(header, tensors, source)
    _save(target, tensors, header)
    return header


def _named_alike(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that a DetectionModel has for them."""
    return {_WRAPPERS.sub("model.", key): value for key, value in tensors.items()}


def _check_absent(target: Path) -> None:
    if target.exists():
        raise WeightsError(f"{target} exists: remove it, or name another file with --output")


def build_model(model: str | dict, num_classes: int) -> DetectionModel:
    """An untrained model: one of ultralytics' by its yaml name, or yolov5{n,s,m,l,x}-anchor.yaml.

    Raises:
        RecipeError: There is no such model, or it is for another task.
    """
    yaml = _model_yaml(model)
    if is_anchor_based(yaml):
        return YoloV5(yaml, num_classes)
    kind = _class_for(model, yaml, _MODELS)
    if kind is WorldModel:  # built for its yaml's number of classes, then given another
        found = kind(yaml, verbose=False)
        found.model[-1].nc = num_classes
        return found
    found = kind(yaml, nc=num_classes, verbose=False)
    if "class_width" in yaml:
        _widen(found.model[-1], kind(copy.deepcopy(yaml), nc=yaml["class_width"], verbose=False).model[-1])
    return found


def _widen(head: Any, of_width: Any) -> None:
    """Give a head the class branches of another, whose number of classes gives them their width, for its own classes.

    The width of ultralytics' class branches follows from the number of classes, except in a model whose training
    started from one with another number.
    """
    for name in ("cv3", "one2one_cv3"):
        if (branches := getattr(of_width, name, None)) is not None:
            for branch in branches:
                branch[-1] = nn.Conv2d(branch[-1].in_channels, head.nc, 1)
            setattr(head, name, branches)


def check_trainable(model: str | dict) -> None:
    """Refuse a model, by its name or yaml, that cannot be trained here.

    Raises:
        RecipeError: There is no such model, or it is for another task.
    """
    _class_for(model, _model_yaml(model), _TRAINED)


def finds_rotated(model: str | dict) -> bool:
    """Whether a model, by its name or yaml, finds rotated boxes; raises RecipeError where there is no such model."""
    return _model_yaml(model)["head"][-1][2].startswith("OBB")


def _class_for(model: str | dict, yaml: dict, known: dict[str, type[DetectionModel]]) -> type[DetectionModel]:
    head = yaml["head"][-1][2]
    if head not in known:
        finds = _OTHER_TASKS.get(head.rstrip("0123456789"), f"boxes of another kind ({head})")
        raise RecipeError(
            f"{model} is a model for {finds}, which is not trained here: give a detection model, as yolo11n.yaml or "
            "yolo11n-obb.yaml"
        )
    return known[head]


def _model_yaml(model: str | dict) -> dict:
    if is_anchor_based(model):
        return anchor_yaml(model) if isinstance(model, str) else model
    try:
        yaml = yaml_model_load(model) if isinstance(model, str) else dict(model)
        yaml["head"][-1][2].rstrip()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(f"no model {model}: name an ultralytics model yaml ({_one_line(error)})") from None
    return yaml


def default_train_args(model: str | dict) -> dict:
    """ultralytics train arguments whose default depends on the model."""
    return dict(TRAIN_DEFAULTS) if is_anchor_based(model) else {}


def load_model(path: Path | str) -> tuple[DetectionModel, Header]:
    """Rebuild a model from a weights file.

    Raises:
        WeightsError: It cannot be read or its tensors do not fit.
    """
    header, tensors = read_weights(path)
    try:
        model = build_model(header.yaml, len(header.classes))
        if isinstance(model, WorldModel):
            model.txt_feats = tensors.pop(WORLD_TEXT)
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(f"{path} does not fit its own model: {_one_line(error)}") from None
    model.names = dict(enumerate(header.classes))
    return model, header


def load_matching(model: torch.nn.Module, path: Path | str) -> tuple[int, int]:
    """Copy into ``model`` the tensors of ``path`` that fit by name and shape, such as where a head has other classes.

    Returns:
        How many tensors fitted, and how many the model has.

    Raises:
        WeightsError: The file cannot be read, or nothing fits.
    """
    own = model.state_dict()
    alone = read_state_dict(path) if is_checkpoint(path) else _read_tensors(path)
    tensors = read_weights(path)[1] if alone is None else _named_alike(alone)
    fitting = {k: v.float() for k, v in tensors.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise WeightsError(f"no tensor of {path} fits this model by name and shape: is it for another architecture?")
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


def read_weights(path: Path | str) -> tuple[Header, dict[str, torch.Tensor]]:
    """What a weights file says of its model, and its tensors, whose names and shapes are known to fit it.

    Raises:
        WeightsError: It cannot be read, its tensors do not fit, or it names something that is not a layer of a model.
    """
    header, tensors = (
        read_checkpoint(path) if is_checkpoint(path) else (read_safetensors_header(path), _read_tensors(path))
    )
    _check_fits(header, tensors, path)
    return header, tensors


def _check_fits(header: Header, tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    try:
        own = _shapes(header)
    except Exception as error:  # noqa: BLE001 (a damaged yaml asks layers for anything)
        raise WeightsError(
            f"{path} describes a model that cannot be built ({_one_line(error)}): it is refused"
        ) from None
    for key, shape in own.items():
        found = list(tensors[key].shape) if key in tensors else "missing"
        if found != shape:
            raise WeightsError(f"{path} does not fit its own model: tensor {key} is {found}, and {shape} in its yaml")


def _shapes(header: Header) -> dict[str, list[int]]:
    """The names and shapes of the tensors of a file's model.

    The model is built without memory for its tensors and its outputs, which may be huge where a file is damaged.

    Raises:
        Exception: What the file says cannot be built.
    """
    yaml = copy.deepcopy(header.yaml)
    if (head := yaml["head"][-1][2]) not in _MODELS:
        raise ValueError(f"{head} is no head that finds boxes")
    for _, repeats, name, _ in yaml["backbone"] + yaml["head"]:
        in_torch = name.startswith("nn.") and isinstance(getattr(nn, name[3:], None), type)
        if not in_torch and name not in _LAYERS:
            raise ValueError(f"{name} is none that the installed ultralytics has")
        if not 0 < repeats * max(1.0, *_depths(yaml)) <= _MOST_REPEATS:
            raise ValueError(f"{name} is repeated {repeats} times")
    with torch.device("meta"):
        if head == "WorldDetect":  # its layers take the text as well
            layers, _ = parse_model(yaml, ch=3, verbose=False)
            own = {f"model.{key}": list(value.shape) for key, value in layers.state_dict().items()}
            return {**own, WORLD_TEXT: [1, len(header.classes), _WORLD_EMBEDDING]}
        layers, passed_on = parse_model({**copy.deepcopy(yaml), "nc": len(header.classes)}, ch=3, verbose=False)
        if "class_width" in yaml:
            _widen(layers[-1], parse_model({**yaml, "nc": yaml["class_width"]}, ch=3, verbose=False)[0][-1])
        _check_outputs(layers.eval()[:-1], passed_on)
        if is_anchor_based(yaml):
            levels = len(yaml["anchors"])
            layers[-1] = AnchorDetect.in_place_of(layers[-1], yaml["anchors"], torch.ones(levels))
    return {f"model.{key}": list(value.shape) for key, value in layers.state_dict().items()}


def _check_outputs(layers: nn.Sequential, passed_on: list[int]) -> None:
    """Run layers as BaseModel._predict_once does, and refuse outputs that are too large."""
    output: Any = torch.zeros(1, 3, 256, 256)
    outputs: list[Any] = []
    for layer in cast(Any, layers):
        sources = [layer.f] if isinstance(layer.f, int) else layer.f
        inputs = [output if source == -1 else outputs[source] for source in sources]
        output = layer(inputs[0] if isinstance(layer.f, int) else inputs)
        made = sum(one.numel() for one in (output if isinstance(output, list | tuple) else [output]))
        if made > _LARGEST_OUTPUT:
            raise ValueError(f"{layer.type} makes {made} numbers of 256 x 256 pixels")
        outputs.append(output if layer.i in passed_on else None)


def _depths(yaml: dict) -> list[float]:
    return [float(yaml.get("depth_multiple", 1)), *(float(scale[0]) for scale in yaml.get("scales", {}).values())]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].encode("utf-8", "replace").decode()


def _save(path: Path, tensors: dict[str, torch.Tensor], header: Header) -> None:
    on_cpu = {key: value.contiguous().cpu() for key, value in tensors.items()}
    data = save(on_cpu, {"softlabel": json.dumps(asdict(header))})
    commit(path, lambda temporary: temporary.write_bytes(data))  # save_file makes files that only their owner can read


def _read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    file = open_weights(path)
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
