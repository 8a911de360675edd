"""What an .onnx of ultralytics says of its model, and what runs it, without torch: drivers read headers here.

ONNX is a graph of known operations: nothing else in a file is run.
"""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

from softlabel.detectors.header import Header
from softlabel.errors import WeightsError
from softlabel.storage import on_disk

_EXPORT = "yolo export model=best.pt format=onnx"
_BESIDES = {"detect": (0, 0), "obb": (1, 1), "segment": (1, 1 << 10), "pose": (1, 1 << 10)}
"""By task, how many numbers (at least, at most) a box has besides its coordinates and class scores."""


def read_onnx_header(path: Path | str) -> Header:
    """What an .onnx says of its model.

    Raises:
        WeightsError: It is not there, is not from ultralytics, is for a task that finds no boxes, has NMS baked in, or
            onnxruntime is not installed.
    """
    session = open_session(path, 1)
    said = session.get_modelmeta().custom_metadata_map
    try:
        names = ast.literal_eval(said["names"])
        classes = tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))
        imgsz, stride, task = ast.literal_eval(said["imgsz"]), int(said["stride"]), said.get("task", "detect")
        imgsz = int(max(imgsz)) if isinstance(imgsz, list) else int(imgsz)
    except (KeyError, ValueError, SyntaxError, TypeError, AttributeError):
        raise WeightsError(
            f"{path} does not say its classes and image size: export it by ultralytics, which writes them ({_EXPORT})"
        ) from None
    if task not in _BESIDES:
        raise WeightsError(f"{path} is a model for {task}, which finds no boxes: give one of a detection model")
    _, rows, *_ = session.get_outputs()[0].shape
    least, most = (4 + len(classes) + besides for besides in _BESIDES[task])
    baked_in = "True" in (said.get("end2end"), said.get("nms")) or "'nms': True" in said.get("args", "")
    if baked_in or (isinstance(rows, int) and not least <= rows <= most):  # a dynamic graph may not say how many
        raise WeightsError(
            f"{path} has NMS baked in, and one class for each box instead of all scores: export it without "
            f"({_EXPORT} nms=False end2end=False)"
        )
    yaml = {"yaml_file": str(path).rpartition("/")[2], "nc": len(classes), "head": [[-1, 1, "ONNX", [stride, task]]]}
    return Header(yaml, classes, imgsz, {})


def open_session(path: Path | str, threads: int | None) -> Any:
    """An onnxruntime session, on CUDA where the installed package has it.

    Args:
        path: The .onnx.
        threads: For one pass; None: as many as onnxruntime thinks best.

    Raises:
        WeightsError: The file is not there or damaged, or onnxruntime is not installed.
    """
    runtime = _onnxruntime(path)
    try:
        file = on_disk(path)
    except FileNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise WeightsError(f"no weights at {path}: give an existing file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in runtime.get_available_providers()]
    try:
        return runtime.InferenceSession(str(file), options, providers=providers)
    # onnxruntime has an exception for each of its status codes, with no common base class.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path} cannot be read as ONNX ({reason}): is it damaged?") from None


def _onnxruntime(path: Path | str) -> ModuleType:
    try:
        import onnxruntime
    except ImportError:
        raise WeightsError(f'{path} needs onnxruntime: pip install "softlabel[onnx]", or give the checkpoint') from None
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime
