"""What a checkpoint (.pt) of ultralytics or of the original YOLOv5 says of its model, and the model's tensors."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softlabel.detectors.header import Header, tensors_alone
from softlabel.detectors.unpickling import StandIn, read_pickle
from softlabel.detectors.yolov5 import SIZES, TRAIN_DEFAULTS, anchor_yaml
from softlabel.errors import WeightsError

_DEFAULT_IMGSZ, _DEFAULT_IMGSZ_P6 = 640, 1280
"""The image size that releases were trained at, where their files do not say."""

_WITH_TEXT = ("YOLOEDetect", "YOLOESegment", "YOLOESegment26")
"""Heads whose last layer is a text embedding, which is merged into the layer before it."""

_BOXES_ALONE = dict.fromkeys(("Segment", "Segment26", "Pose", "Pose26", *_WITH_TEXT), "Detect")
"""Heads that find boxes as ``Detect`` does, with masks or keypoints besides, or of classes given as text."""

_HEADS = {"Detect", "v10Detect", "OBB", "OBB26", "RTDETRDecoder", "WorldDetect", *_BOXES_ALONE}

WORLD_TEXT = "txt_feats"
"""The tensor with YOLO-World's text embeddings, (1, classes, 512)."""

_STATE_DICTS = ("ema", "model", "state_dict", "model_state_dict")

_EARLIER_LAYERS = {"Silence": "nn.Identity"}

_OTHER_HEADS = {
    "Classify": "is a classification model, which finds no boxes",
    "SemanticSegment": "is a semantic segmentation model, which finds no boxes",
    "Depth": "is a depth model, which finds no boxes",
}


def read_checkpoint(path: Path | str) -> tuple[Header, dict[str, torch.Tensor]]:
    """A .pt file's model and its tensors, as float32 (counters stay integers).

    Of a model that finds masks or keypoints besides boxes, only the part that finds the boxes.

    Raises:
        WeightsError: It cannot be read safely, or holds something other than a detection model.
    """
    content = read_pickle(path)
    try:
        model = _model_of(content, path)
        layers = model._modules["model"]
        place, head = list(layers._modules.items())[-1]
        kind = type(head).__name__
        if kind not in _HEADS:
            is_one = _OTHER_HEADS.get(kind, f"ends in a layer {kind}, which softlabel does not know")
            raise WeightsError(f"{path} {is_one}: give a checkpoint of a detection model")
        tensors = {f"model.{key}": _as_float32(value) for key, value in _tensors(layers)}
        if "anchors" in head._buffers:
            return _yolov5_header(model, head, content), tensors
        if kind in _WITH_TEXT:
            tensors |= _with_text(model, head, tensors, f"model.{place}.")
        if kind in _BOXES_ALONE:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(f"model.{place}.") or _finds_boxes(k)}
        if kind == "WorldDetect":
            return _world_header(model, head, content), {**tensors, WORLD_TEXT: _as_float32(model.txt_feats)}
        header = _ultralytics_header(model, kind, content, head.nc if kind in _WITH_TEXT else None)
        width = _class_width(tensors, f"model.{place}.", len(header.classes))
        return replace(header, yaml={**header.yaml, **width}), tensors
    # What a damaged pickle holds may be anything.
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{path} holds no detection model of ultralytics or YOLOv5 ({type(error).__name__}: {_one_line(error)})"
        ) from None


def read_state_dict(path: Path | str) -> dict[str, torch.Tensor] | None:
    """The tensors of a .pt file that holds nothing else, as ``torch.save(model.state_dict())`` makes it, as float32.

    Returns:
        None where it holds something else, such as a whole model.

    Raises:
        WeightsError: It cannot be read safely.
    """
    found = _state_dict_in(read_pickle(path))
    return None if found is None else {str(key): _as_float32(value) for key, value in found.items()}


def _model_of(content: Any, path: Path | str) -> Any:
    """The EMA where there is one, since ultralytics and YOLOv5 predict with it."""
    if _state_dict_in(content) is not None:
        raise WeightsError(tensors_alone(path))
    found = content
    if isinstance(content, dict):
        found = content["model"] if content.get("ema") is None else content["ema"]
    return found._modules.get("module", found)  # of DistributedDataParallel


def _state_dict_in(content: Any) -> dict[str, torch.Tensor] | None:
    """The state_dict that a file's content is, or holds under one of the usual names."""
    inside = [content.get(key) for key in _STATE_DICTS] if isinstance(content, dict) else []
    for found in (content, *inside):
        if isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
            return found
    return None


def _ultralytics_header(model: Any, kind: str, content: Any, num_classes: int | None = None) -> Header:
    yaml, args = _yaml_of(model, kind), _train_args(model, content)
    if num_classes is not None:  # that of the classes it was given, not of those it was built for
        yaml["nc"] = num_classes
    return Header(yaml, _class_names(model, yaml["nc"]), _imgsz(args.get("imgsz"), _DEFAULT_IMGSZ), args)


def _with_text(model: Any, head: Any, tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The last convolutions of YOLOE's class branches, for the classes that its text embeddings were last made of.

    A class scores as its embedding's product with the branch's normalised output. That is linear, as the convolution
    before it is, so both are one convolution (as in ultralytics' YOLOEDetect.fuse).
    """
    text = getattr(model, "pe", None)
    if text is None or hasattr(head, "lrpc") or "lrpc" in head._modules:
        raise ValueError("it is a YOLOE without classes: save it after model.set_classes([...], ...)")
    text_KD = torch.nn.functional.normalize(_as_float32(text)[0], dim=-1)
    made = {}
    for branch, contrast in (("cv3", "cv4"), ("one2one_cv3", "one2one_cv4")):
        modules = head._modules.get(contrast)
        for i, module in enumerate(modules._modules.values() if modules is not None else ()):
            last, norm = f"{prefix}{branch}.{i}.2.", f"{prefix}{contrast}.{i}.norm."
            if f"{norm}weight" not in tensors:  # fused already
                continue
            variance = tensors[f"{norm}running_var"] + module._modules["norm"].eps
            scale_D = tensors[f"{norm}weight"] / variance.sqrt()
            shift_D = (tensors[f"{last}bias"] - tensors[f"{norm}running_mean"]) * scale_D + tensors[f"{norm}bias"]
            scaled_KD = text_KD * tensors[f"{prefix}{contrast}.{i}.logit_scale"].exp()
            weight_DC = tensors[f"{last}weight"][:, :, 0, 0] * scale_D[:, None]
            made[f"{last}weight"] = (scaled_KD @ weight_DC)[:, :, None, None]
            made[f"{last}bias"] = scaled_KD @ shift_D + tensors[f"{prefix}{contrast}.{i}.bias"]
    return made


def _world_header(model: Any, head: Any, content: Any) -> Header:
    """That of a YOLO-World, whose classes are those that its text embeddings were last made of."""
    yaml, args = _yaml_of(model, "WorldDetect"), _train_args(model, content)
    return Header(yaml, _class_names(model, head.nc), _imgsz(args.get("imgsz"), _DEFAULT_IMGSZ), args)


def _class_width(tensors: dict[str, torch.Tensor], head: str, num_classes: int) -> dict[str, int]:
    """The hidden width of a head's class branch, where it does not follow from the number of classes.

    ultralytics (8.4) keeps that of the weights that training started from, which follows from their number of classes.
    """
    last, first = tensors.get(f"{head}cv3.0.2.weight"), tensors.get(f"{head}cv2.0.0.conv.weight")
    if last is None or first is None or last.shape[1] == max(first.shape[1], min(num_classes, 100)):
        return {}
    return {"class_width": last.shape[1]}


def _yolov5_header(model: Any, head: Any, content: Any) -> Header:
    yaml = {**_yaml_of(model, "Detect"), **_activations(model)}
    stride = model.stride.float()
    in_pixels = head._buffers["anchors"].float() * stride.view(-1, 1, 1)
    yaml["anchors"] = [level.flatten().tolist() for level in in_pixels]
    options = content.get("opt") if isinstance(content, dict) else None
    options = options if isinstance(options, dict) else vars(options) if isinstance(options, StandIn) else {}
    default = _DEFAULT_IMGSZ_P6 if len(stride) == 4 else _DEFAULT_IMGSZ
    imgsz = _imgsz(options.get("imgsz", options.get("img_size")), default)
    return Header(_named(yaml), _class_names(model, yaml["nc"]), imgsz, dict(TRAIN_DEFAULTS))


def _yaml_of(model: Any, kind: str) -> dict:
    """The yaml that a model was built from, with a head that finds boxes and nothing else.

    Raises:
        ValueError: It does not take RGB.
    """
    yaml = _plain(model.yaml)
    if (channels := yaml.get("ch", yaml.get("channels", 3))) != 3:
        raise ValueError(f"it takes images of {channels} channels, and tiles are RGB")
    *layers, (source, repeats, _, args) = yaml["head"]
    layers = [[*layer[:2], _EARLIER_LAYERS.get(layer[2], layer[2]), *layer[3:]] for layer in layers]
    name = _BOXES_ALONE.get(kind, kind)
    head = [source, repeats, name, args[:1] if name == "Detect" else args]
    kept = {key: value for key, value in yaml.items() if key not in ("anchors", "kpt_shape")}
    return {**kept, "head": [*layers, head], "yaml_file": Path(str(yaml.get("yaml_file", "model.yaml"))).name}


def _named(yaml: dict) -> dict:
    """The yaml of yolov5{n,s,m,l,x}-anchor.yaml where a checkpoint is one of these, with the checkpoint's anchors."""
    for size in SIZES:
        known = anchor_yaml(f"yolov5{size}-anchor.yaml")
        depth, width, _ = known["scales"][size]
        one = {"depth_multiple": depth, "width_multiple": width, "activation": None}
        if all(yaml.get(key) == {**known, **one}[key] for key in ("backbone", "head", *one)):
            return {**known, "nc": yaml["nc"], "anchors": yaml["anchors"]}
    return {**yaml, "yaml_file": "yolov5-anchor.yaml"}


def _activations(model: Any) -> dict:
    """Activations other than SiLU, as in YOLOv5 before v4: a model's modules name them, where its yaml may not."""
    found = {}
    for kind, key in (("Conv", "activation"), ("BottleneckCSP", "csp_activation")):
        used = {_activation(module) for module in _modules(model) if type(module).__name__ == kind} - {None}
        if used - {"nn.SiLU()"}:
            (found[key],) = used
    return found


def _activation(module: Any) -> str | None:
    act = module._modules.get("act")
    name = type(act).__name__
    if act is None or name == "Identity":
        return None
    return f"nn.{name}({float(act.negative_slope)})" if name == "LeakyReLU" else f"nn.{name}()"


def _class_names(model: Any, num_classes: int) -> tuple[str, ...]:
    names = model.names
    names = tuple(_one_line(name) for name in (names.values() if isinstance(names, dict) else names))
    if len(names) != num_classes:
        raise ValueError(f"it names {len(names)} classes and finds {num_classes}")
    return names


def _train_args(model: Any, content: Any) -> dict:
    """The plain values among the training arguments."""
    found = content.get("train_args") if isinstance(content, dict) else None
    found = getattr(model, "args", {}) if found is None else found
    found = found if isinstance(found, dict) else vars(found)
    return {key: value for key, value in found.items() if isinstance(key, str) and _is_plain(value)}


def _imgsz(found: Any, default: int) -> int:
    found = max(found) if isinstance(found, list | tuple) else found
    return int(found) if isinstance(found, int | float) and 0 < found < 1 << 16 else default


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _plain(value: Any) -> Any:
    """A copy that holds nothing but JSON values.

    Raises:
        TypeError: There is something else in it.
    """
    return json.loads(json.dumps(value))


def _finds_boxes(key: str) -> bool:
    """Whether a head's tensor is one that ``Detect`` has too."""
    return key.split(".")[2].removeprefix("one2one_") in ("cv2", "cv3", "dfl")


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module and all below it, as its state_dict would name them."""
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        passing = name == "anchor_grid" or name in getattr(module, "_non_persistent_buffers_set", ())
        if value is not None and not passing:
            yield prefix + name, value
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Releases hold half precision; counters stay integers."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _one_line(said: object) -> str:
    return " ".join(str(said).split())[:200].encode("utf-8", "replace").decode()
