"""What a weights file says of its model, whatever wrote it."""

import math
from pathlib import Path

from softlabel.detectors.class_map import listed
from softlabel.detectors.families import FAMILIES
from softlabel.detectors.header import Header, is_checkpoint, is_onnx, open_weights, read_safetensors_header
from softlabel.storage import location

_TASKS = {
    "segment": "boxes; its masks are left out",
    "pose": "boxes; its keypoints are left out",
    "obb": "rotated boxes",
}


def read_header(path: Path | str) -> Header:
    """What a weights file says of its model. Only a checkpoint needs torch to be read.

    Raises:
        WeightsError: It is neither a safetensors file that this project wrote nor a checkpoint or .onnx that it reads.
    """
    if is_checkpoint(path):
        from softlabel.detectors.weights import read_weights

        return read_weights(path)[0]
    if is_onnx(path):
        from softlabel.detectors.onnx_file import read_onnx_header

        return read_onnx_header(path)
    return read_safetensors_header(path)


def describe(weights: str) -> dict[str, str]:
    """What a file is and what can be done with it, a line per key.

    Args:
        weights: A weights file; or the folder of a transformers model, or its name on the hub.

    Raises:
        WeightsError: Nothing can be done with it; the message says why.
    """
    from softlabel.detectors.hub import is_file

    return _file(location(weights)) if is_file(weights) or location(weights).is_file() else _folder(weights)


def _file(path: Path) -> dict[str, str]:
    from softlabel.detectors.weights import check_trainable, load_model
    from softlabel.errors import RecipeError

    if is_onnx(path):
        header = read_header(path)
        return {
            "file": f"{path}, ONNX",
            "family": "onnx (run by onnxruntime)",
            "finds": _TASKS.get(header.yaml["head"][-1][3][1], "boxes"),
            "classes": f"{len(header.classes)}: {listed(header.classes)}",
            "imgsz": f"{header.imgsz} px",
            "use": f"as a teacher: label.weights={path}",
        }
    model, header = load_model(path)
    use = [f"as a teacher: label.weights={path}"]
    try:
        check_trainable(header.yaml)
        use.append("to start training: train.student.weights")
    except RecipeError:
        pass
    return {
        "file": f"{path}, {'a checkpoint, read without running it' if is_checkpoint(path) else 'safetensors'}",
        "family": f"{header.family} ({header.yaml.get('yaml_file', 'a yaml of its own')})",
        "finds": _TASKS.get(header.train_args.get("task", ""), "boxes"),
        "classes": f"{len(header.classes)}: {listed(header.classes)}",
        "imgsz": f"{header.imgsz} px",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "use": "; ".join(use),
    }


def _folder(model: str) -> dict[str, str]:
    from softlabel.detectors.hub import class_names, local_folder, model_files, model_type

    folder = local_folder(model)
    kind = model_type(folder)
    tensors = [open_weights(path) for path in model_files(folder) if path.suffix == ".safetensors"]
    shapes = (file.get_slice(key).get_shape() for file in tensors for key in file.keys())  # noqa: SIM118
    common = {
        "folder": str(folder),
        "family": f"{kind} of transformers",
        "parameters": f"{sum(map(math.prod, shapes)):,}",
    }
    if FAMILIES[kind].open_vocabulary:
        use = f"as a teacher: label.open_vocabulary.model={model}, with label.open_vocabulary.prompts"
        return {**common, "finds": "boxes of whatever it is told", "use": use}
    names = class_names(folder)
    classes = f"{len(names)}: {listed(names)}"
    return {**common, "finds": "boxes", "classes": classes, "use": f"as a teacher: label.weights={model}"}
